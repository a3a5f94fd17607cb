#include "veloxquant/kernels/divergence.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "veloxquant/core/parallel.h"

#ifndef VELOXQUANT_KERNELS_DIVERGENCE_SUMS
#define VELOXQUANT_KERNELS_DIVERGENCE_SUMS
namespace veloxquant {
namespace {

// With a = reference − its maximum, b = logits − theirs and d = b − a.
struct Sums {
  double z;         // Σ e^a
  double z_other;   // Σ e^b
  double gained;    // Σ (e^b − e^a)
  double weighted;  // Σ e^a · d
};

}  // namespace
}  // namespace veloxquant
#endif

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "veloxquant/kernels/divergence.cpp"
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

float maximum(const float* x, std::size_t n) {
  return row_maximum(x, n, x[0]);
}

// Adds a block of n logits, a multiple of the lanes.  Both exponentials come from the larger one and Expm1 of what lies between, so
// that e^b − e^a keeps its digits where a and b are close.  A pair of −∞ adds nothing.
void add_block(const float* reference, const float* logits, std::size_t n, float reference_top, float top, Sums& sums) {
  const hn::ScalableTag<float> tag;
  const auto zero = hn::Zero(tag), va = hn::Set(tag, reference_top), vb = hn::Set(tag, top);
  auto z = zero, z_other = zero, gained = zero, weighted = zero;
  for (std::size_t i = 0; i < n; i += hn::Lanes(tag)) {
    const auto a = hn::Sub(hn::LoadU(tag, reference + i), va), b = hn::Sub(hn::LoadU(tag, logits + i), vb);
    const auto d = hn::IfThenElse(hn::Eq(a, b), zero, hn::Sub(b, a));  // −∞ − −∞ is no number
    const auto larger = hn::Exp(tag, hn::Max(a, b)), step = hn::Mul(larger, hn::Expm1(tag, hn::Neg(hn::Abs(d))));
    const auto smaller = hn::Add(larger, step);
    const auto rises = hn::Gt(d, zero);
    const auto ea = hn::IfThenElse(rises, smaller, larger);
    z = hn::Add(z, ea);
    z_other = hn::Add(z_other, hn::IfThenElse(rises, larger, smaller));
    gained = hn::Add(gained, hn::IfThenElse(rises, hn::Neg(step), step));
    weighted = hn::Add(weighted, hn::IfThenElseZero(hn::Gt(ea, zero), hn::Mul(ea, d)));
  }
  sums.z += hn::GetLane(hn::SumOfLanes(tag, z));
  sums.z_other += hn::GetLane(hn::SumOfLanes(tag, z_other));
  sums.gained += hn::GetLane(hn::SumOfLanes(tag, gained));
  sums.weighted += hn::GetLane(hn::SumOfLanes(tag, weighted));
}

// Blocks are added in double: the divergence is a small difference of their sums.
void divergence_sums(const float* reference, const float* logits, std::size_t n, float reference_top, float top, Sums& sums) {
  const hn::ScalableTag<float> tag;
  constexpr std::size_t kBlock = 256;
  const std::size_t whole = n / hn::Lanes(tag) * hn::Lanes(tag);
  for (std::size_t begin = 0; begin < whole; begin += kBlock)
    add_block(reference + begin, logits + begin, std::min(kBlock, whole - begin), reference_top, top, sums);
  if (whole == n) return;
  HWY_ALIGN float last_reference[hn::MaxLanes(tag)], last_logits[hn::MaxLanes(tag)];
  std::fill_n(last_reference, hn::Lanes(tag), -std::numeric_limits<float>::infinity());
  std::fill_n(last_logits, hn::Lanes(tag), -std::numeric_limits<float>::infinity());
  std::copy(reference + whole, reference + n, last_reference);
  std::copy(logits + whole, logits + n, last_logits);
  add_block(last_reference, last_logits, hn::Lanes(tag), reference_top, top, sums);
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
  // log(Z̃ / Z), from what was gained while that is little.
  const double gain = sums.gained / sums.z;
  const double log_ratio = std::abs(gain) < 0.5 ? std::log1p(gain) : std::log(sums.z_other / sums.z);
  const double kl = log_ratio - sums.weighted / sums.z;
  return {
      .kl = static_cast<float>(std::max(kl, 0.0)),
      .cross_entropy = target < 0 ? 0.0f : static_cast<float>(std::log(sums.z_other) - (static_cast<double>(logits[target]) - top)),
      .top = static_cast<std::int32_t>(std::find(logits, logits + n, top) - logits)};
}

}  // namespace

void divergence(const float* reference, const float* logits, const std::int32_t* targets, std::size_t vocabulary,
                std::span<Divergence> out) {
  constexpr std::size_t kBlockRows = 8;
  parallel_for(out.size(), kBlockRows, [&](std::size_t begin, std::size_t end) {
    for (std::size_t r = begin; r < end; ++r)
      out[r] = row_divergence(reference + r * vocabulary, logits + r * vocabulary, targets[r], vocabulary);
  });
}

}  // namespace veloxquant
#endif
