#include "veloxquant/kernels/hadamard.h"

#include <bit>
#include <cmath>

#include "veloxquant/core/error.h"
#include "veloxquant/core/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "veloxquant/kernels/hadamard.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace veloxquant {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Butterflies over pairs `distance` apart, a power of two; no less than the lanes.
template <class D>
void butterflies(D d, float* x, std::size_t dim, std::size_t distance) {
  for (std::size_t begin = 0; begin < dim; begin += 2 * distance) {
    for (std::size_t i = begin; i < begin + distance; i += hn::Lanes(d)) {
      const auto a = hn::LoadU(d, x + i), b = hn::LoadU(d, x + i + distance);
      hn::StoreU(hn::Add(a, b), d, x + i);
      hn::StoreU(hn::Sub(a, b), d, x + i + distance);
    }
  }
}

#if HWY_TARGET != HWY_SCALAR
// Distances 1 and 2 at once, inside vectors, and the scale of the whole transform.
template <class D>
void butterflies_in_quads(D d, float* x, std::size_t dim, float scale) {
  alignas(16) static constexpr float kSigns1[4] = {1, -1, 1, -1}, kSigns2[4] = {1, 1, -1, -1};
  const auto vscale = hn::Set(d, scale);
  const auto signs1 = hn::LoadDup128(d, kSigns1), signs2 = hn::Mul(hn::LoadDup128(d, kSigns2), vscale);
  for (std::size_t i = 0; i < dim; i += hn::Lanes(d)) {
    auto v = hn::LoadU(d, x + i);
    v = hn::MulAdd(v, signs1, hn::Shuffle2301(v));
    hn::StoreU(hn::MulAdd(v, signs2, hn::Mul(hn::Shuffle1032(v), vscale)), d, x + i);
  }
}
#endif

// Distances 1 and 2, and the scale; returns the distance that is next.
std::size_t short_distances(float* x, std::size_t dim, float scale) {
#if HWY_TARGET != HWY_SCALAR
  const hn::ScalableTag<float> wide;
  if (dim >= hn::Lanes(wide)) return butterflies_in_quads(wide, x, dim, scale), 4;
  if (dim >= 4) return butterflies_in_quads(hn::CappedTag<float, 4>(), x, dim, scale), 4;
#endif
  for (std::size_t i = 0; i < dim; ++i) x[i] *= scale;
  if (dim > 1) butterflies(hn::CappedTag<float, 1>(), x, dim, 1);
  if (dim > 2) butterflies(hn::CappedTag<float, 1>(), x, dim, 2);
  return 4;
}

void hadamard_rows(float* x, std::size_t rows, std::size_t dim) {
  const hn::ScalableTag<float> wide;
  const hn::CappedTag<float, 4> quad;
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  for (std::size_t r = 0; r < rows; ++r, x += dim) {
    std::size_t distance = short_distances(x, dim, scale);
    for (; distance < dim && distance < hn::Lanes(wide); distance *= 2) butterflies(quad, x, dim, distance);
    for (; distance < dim; distance *= 2) butterflies(wide, x, dim, distance);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace veloxquant
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace veloxquant {

HWY_EXPORT(hadamard_rows);

void hadamard(float* x, std::size_t rows, std::size_t dim) {
  constexpr std::size_t kBlockElements = 1 << 15;
  parallel_for(rows, kBlockElements / dim + 1, [&](std::size_t begin, std::size_t end) {
    HWY_DYNAMIC_DISPATCH(hadamard_rows)(x + begin * dim, end - begin, dim);
  });
}

std::vector<float> walsh_hadamard_matrix(std::size_t dim) {
  if (!is_power_of_two(dim) || dim > 65536)
    throw_invalid("walsh_hadamard_matrix", "expected a power of two up to 65536, got {}", dim);
  const float value = 1.0f / std::sqrt(static_cast<float>(dim));
  std::vector<float> matrix(dim * dim);
  for (std::size_t i = 0; i < dim; ++i)
    for (std::size_t j = 0; j < dim; ++j) matrix[i * dim + j] = std::popcount(i & j) % 2 == 0 ? value : -value;
  return matrix;
}

}  // namespace veloxquant
#endif
