#include "veloxquant/kernels/running_softmax.h"

#include <cmath>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "veloxquant/kernels/running_softmax.cpp"
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

// Scores s become cap · tanh(s / cap).
void cap_scores(float* scores, std::size_t count, float cap) {
  const hn::ScalableTag<float> d;
  const std::size_t lanes = hn::Lanes(d), whole = count / lanes * lanes;
  const auto vcap = hn::Set(d, cap), inverse = hn::Set(d, 1.0f / cap);
  for (std::size_t i = 0; i < whole; i += lanes)
    hn::StoreU(hn::Mul(vcap, hn::Tanh(d, hn::Mul(hn::LoadU(d, scores + i), inverse))), d, scores + i);
  for (std::size_t i = whole; i < count; ++i) scores[i] = cap * std::tanh(scores[i] / cap);
}

float running_softmax(float* scores, std::size_t count, float soft_cap, float& maximum, float& sum) {
  if (soft_cap > 0) cap_scores(scores, count, soft_cap);
  const hn::ScalableTag<float> d;
  const std::size_t lanes = hn::Lanes(d), whole = count / lanes * lanes;
  const float top = row_maximum(scores, count, maximum);
  auto sums = hn::Zero(d);
  const auto vtop = hn::Set(d, top);
  for (std::size_t i = 0; i < whole; i += lanes) {
    const auto weight = hn::Exp(d, hn::Sub(hn::LoadU(d, scores + i), vtop));
    hn::StoreU(weight, d, scores + i);
    sums = hn::Add(sums, weight);
  }
  float added = hn::GetLane(hn::SumOfLanes(d, sums));
  for (std::size_t i = whole; i < count; ++i) added += scores[i] = std::exp(scores[i] - top);

  const float shrink = std::exp(maximum - top);
  maximum = top;
  sum = sum * shrink + added;
  return shrink;
}

}  // namespace HWY_NAMESPACE
}  // namespace veloxquant
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace veloxquant {

HWY_EXPORT(running_softmax);

float running_softmax(float* scores, std::size_t count, float soft_cap, float& maximum, float& sum) {
  return HWY_DYNAMIC_DISPATCH(running_softmax)(scores, count, soft_cap, maximum, sum);
}

}  // namespace veloxquant
#endif
