// Vector code that several kernels apply to rows.  Included once for each target, after Highway.
#if defined(VELOXQUANT_KERNELS_ROWS_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef VELOXQUANT_KERNELS_ROWS_INL_H
#undef VELOXQUANT_KERNELS_ROWS_INL_H
#else
#define VELOXQUANT_KERNELS_ROWS_INL_H
#endif

#include <algorithm>
#include <cstddef>

#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace veloxquant {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

/// sums[0 … n): vectors, n a power of two.  Afterwards neighbouring lanes of sums[0] are the sums of the vectors, in order.
template <std::size_t n>
void sum_vectors([[maybe_unused]] hn::Vec<hn::ScalableTag<float>>* sums) {
#if HWY_TARGET != HWY_SCALAR  // where a vector is its own sum, and Highway has no shuffles
  const hn::ScalableTag<float> d;
  for (std::size_t i = 0; i < n / 2; ++i) {
    const auto a = sums[2 * i], b = sums[2 * i + 1];
    sums[i] = hn::Add(hn::ConcatEven(d, b, a), hn::ConcatOdd(d, b, a));
  }
  if constexpr (n > 2) sum_vectors<n / 2>(sums);
#endif
}

/// The largest of x [n] and `least`.
inline float row_maximum(const float* x, std::size_t n, float least) {
  const hn::ScalableTag<float> d;
  const std::size_t lanes = hn::Lanes(d), whole = n / lanes * lanes;
  auto tops = hn::Set(d, least);
  for (std::size_t i = 0; i < whole; i += lanes) tops = hn::Max(tops, hn::LoadU(d, x + i));
  float top = hn::GetLane(hn::MaxOfLanes(d, tops));
  for (std::size_t i = whole; i < n; ++i) top = std::max(top, x[i]);
  return top;
}

/// x [n] times a factor, in place.
inline void scale_row(float* x, std::size_t n, float factor) {
  const hn::ScalableTag<float> d;
  const std::size_t lanes = hn::Lanes(d), whole = n / lanes * lanes;
  const auto vfactor = hn::Set(d, factor);
  for (std::size_t i = 0; i < whole; i += lanes) hn::StoreU(hn::Mul(hn::LoadU(d, x + i), vfactor), d, x + i);
  for (std::size_t i = whole; i < n; ++i) x[i] *= factor;
}

/// Inner product of a and b [n].
inline float row_dot(const float* a, const float* b, std::size_t n) {
  const hn::ScalableTag<float> d;
  const std::size_t lanes = hn::Lanes(d), whole = n / lanes * lanes;
  auto sum = hn::Zero(d);
  for (std::size_t i = 0; i < whole; i += lanes) sum = hn::MulAdd(hn::LoadU(d, a + i), hn::LoadU(d, b + i), sum);
  float dot = hn::GetLane(hn::SumOfLanes(d, sum));
  for (std::size_t i = whole; i < n; ++i) dot += a[i] * b[i];
  return dot;
}

}  // namespace HWY_NAMESPACE
}  // namespace veloxquant
HWY_AFTER_NAMESPACE();

#endif
