#include "veloxquant/kernels/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "veloxquant/core/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "veloxquant/kernels/sampling.cpp"
// clang-format off
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "hwy/contrib/math/math-inl.h"
#include "veloxquant/kernels/rows-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace veloxquant {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

float top_of(const float* x, std::size_t n) {
  return row_maximum(x, n, x[0]);
}

// weights [n] = e^(x − top); returns their sum.
float exponentials(const float* x, std::size_t n, float top, float* weights) {
  const hn::ScalableTag<float> d;
  const std::size_t lanes = hn::Lanes(d), whole = n / lanes * lanes;
  const auto vtop = hn::Set(d, top);
  auto sum = hn::Zero(d);
  for (std::size_t i = 0; i < whole; i += lanes) {
    const auto weight = hn::Exp(d, hn::Sub(hn::LoadU(d, x + i), vtop));
    hn::StoreU(weight, d, weights + i);
    sum = hn::Add(sum, weight);
  }
  float total = hn::GetLane(hn::SumOfLanes(d, sum));
  for (std::size_t i = whole; i < n; ++i) total += weights[i] = std::exp(x[i] - top);
  return total;
}

void multiply(float* x, std::size_t n, float factor) {
  scale_row(x, n, factor);
}

}  // namespace HWY_NAMESPACE
}  // namespace veloxquant
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace veloxquant {

HWY_EXPORT(top_of);
HWY_EXPORT(exponentials);
HWY_EXPORT(multiply);

namespace {

// Sums of blocks are added in double: a cumulated probability is as exact as its terms.
constexpr std::size_t kBlock = 256;

// Unnormalised probabilities of a row and the token that a uniform number picks.
struct Draw {
  std::size_t token;
  double total;
};

Draw draw(const float* logits, float uniform, std::size_t vocabulary, float* weights) {
  const float top = HWY_DYNAMIC_DISPATCH(top_of)(logits, vocabulary);
  std::vector<float> sums;
  double total = 0;
  for (std::size_t begin = 0; begin < vocabulary; begin += kBlock) {
    sums.push_back(HWY_DYNAMIC_DISPATCH(exponentials)(logits + begin, std::min(kBlock, vocabulary - begin), top, weights + begin));
    total += sums.back();
  }
  double left = uniform * total;
  std::size_t block = 0;
  while (block + 1 < sums.size() && left >= sums[block]) left -= sums[block++];
  // Rounding may leave a rest behind the last token that has a probability at all.
  while (block > 0 && sums[block] <= 0) --block;
  std::size_t token = block * kBlock;
  for (std::size_t i = block * kBlock; i < vocabulary && left >= 0; ++i) {
    if (weights[i] <= 0) continue;
    token = i;
    left -= weights[i];
  }
  return {token, total};
}

}  // namespace

void sample_tokens(const float* logits, const float* uniforms, std::size_t rows, std::size_t vocabulary, std::int32_t* tokens) {
  parallel_for(rows, 1, [&](std::size_t r, std::size_t) {
    std::vector<float> weights(vocabulary);
    tokens[r] = static_cast<std::int32_t>(draw(logits + r * vocabulary, uniforms[r], vocabulary, weights.data()).token);
  });
}

void sampled_score(const float* logits, const float* uniforms, std::size_t rows, std::size_t vocabulary, float* gradient) {
  parallel_for(rows, 1, [&](std::size_t r, std::size_t) {
    float* out = gradient + r * vocabulary;
    const Draw drawn = draw(logits + r * vocabulary, uniforms[r], vocabulary, out);
    HWY_DYNAMIC_DISPATCH(multiply)(out, vocabulary, static_cast<float>(-1 / drawn.total));
    out[drawn.token] += 1;
  });
}

}  // namespace veloxquant
#endif
