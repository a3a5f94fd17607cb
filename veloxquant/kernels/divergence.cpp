#include "veloxquant/kernels/divergence.h"

#include <algorithm>
#include <cmath>

#include "veloxquant/core/parallel.h"

#ifndef VELOXQUANT_KERNELS_DIVERGENCE_SUMS
#define VELOXQUANT_KERNELS_DIVERGENCE_SUMS
namespace veloxquant {
namespace {

struct Sums {
  double z, z_other, weighted;
};

}  // namespace
}  // namespace veloxquant
#endif

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "veloxquant/kernels/divergence.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "hwy/contrib/math/math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace veloxquant {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

float maximum(const float* x, std::size_t n) {
  const hn::ScalableTag<float> d;
  const std::size_t lanes = hn::Lanes(d), whole = n / lanes * lanes;
  auto tops = hn::Set(d, x[0]);
  for (std::size_t i = 0; i < whole; i += lanes) tops = hn::Max(tops, hn::LoadU(d, x + i));
  float top = hn::GetLane(hn::MaxOfLanes(d, tops));
  for (std::size_t i = whole; i < n; ++i) top = std::max(top, x[i]);
  return top;
}

// With a = reference − max and b = logits − max: Z = Σ e^a, Z̃ = Σ e^b, S = Σ e^a·(a − b), all in blocks that are added in double, since
// the divergence S/Z − log Z + log Z̃ is a small difference of large terms.
void divergence_sums(const float* reference, const float* logits, std::size_t n, float reference_top, float top, Sums& sums) {
  const hn::ScalableTag<float> d;
  constexpr std::size_t kBlock = 256;
  const std::size_t lanes = hn::Lanes(d);
  const auto va = hn::Set(d, reference_top), vb = hn::Set(d, top);
  for (std::size_t begin = 0; begin < n; begin += kBlock) {
    const std::size_t end = std::min(begin + kBlock, n), whole = begin + (end - begin) / lanes * lanes;
    auto z = hn::Zero(d), z_other = hn::Zero(d), weighted = hn::Zero(d);
    for (std::size_t i = begin; i < whole; i += lanes) {
      const auto a = hn::Sub(hn::LoadU(d, reference + i), va), b = hn::Sub(hn::LoadU(d, logits + i), vb);
      const auto ea = hn::Exp(d, a);
      z = hn::Add(z, ea);
      z_other = hn::Add(z_other, hn::Exp(d, b));
      weighted = hn::MulAdd(ea, hn::Sub(a, b), weighted);
    }
    sums.z += hn::GetLane(hn::SumOfLanes(d, z));
    sums.z_other += hn::GetLane(hn::SumOfLanes(d, z_other));
    sums.weighted += hn::GetLane(hn::SumOfLanes(d, weighted));
    for (std::size_t i = whole; i < end; ++i) {
      const float a = reference[i] - reference_top, b = logits[i] - top, ea = std::exp(a);
      sums.z += ea;
      sums.z_other += std::exp(b);
      sums.weighted += ea * (a - b);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace veloxquant
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace veloxquant {

HWY_EXPORT(maximum);
HWY_EXPORT(divergence_sums);

namespace {

Divergence row_divergence(const float* reference, const float* logits, std::int32_t target, std::size_t n) {
  const float reference_top = HWY_DYNAMIC_DISPATCH(maximum)(reference, n), top = HWY_DYNAMIC_DISPATCH(maximum)(logits, n);
  Sums sums{};
  HWY_DYNAMIC_DISPATCH(divergence_sums)(reference, logits, n, reference_top, top, sums);
  const double log_z = std::log(sums.z), log_other = std::log(sums.z_other);
  const double kl = reference == logits ? 0.0 : sums.weighted / sums.z - log_z + log_other;
  return {.kl = static_cast<float>(std::max(kl, 0.0)),
          .cross_entropy = target < 0 ? 0.0f : static_cast<float>(log_other - (static_cast<double>(logits[target]) - top)),
          .top = static_cast<std::int32_t>(std::find(logits, logits + n, top) - logits)};
}

}  // namespace

void divergence(const float* reference, const float* logits, const std::int32_t* targets, std::size_t vocabulary, std::span<Divergence> out) {
  constexpr std::size_t kBlockRows = 8;
  parallel_for(out.size(), kBlockRows, [&](std::size_t begin, std::size_t end) {
    for (std::size_t r = begin; r < end; ++r)
      out[r] = row_divergence(reference + r * vocabulary, logits + r * vocabulary, targets[r], vocabulary);
  });
}

}  // namespace veloxquant
#endif
