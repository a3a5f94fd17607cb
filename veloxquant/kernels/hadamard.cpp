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

// Butterflies over pairs `distance` apart; those closer than a vector one by one.
void hadamard_rows(float* x, std::size_t rows, std::size_t dim) {
  const hn::ScalableTag<float> d;
  const std::size_t lanes = hn::Lanes(d);
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  const auto vscale = hn::Set(d, scale);
  for (std::size_t r = 0; r < rows; ++r, x += dim) {
    std::size_t distance = 1;
    for (; distance < dim && distance < lanes; distance *= 2) {
      for (std::size_t begin = 0; begin < dim; begin += 2 * distance) {
        for (std::size_t i = begin; i < begin + distance; ++i) {
          const float a = x[i], b = x[i + distance];
          x[i] = a + b;
          x[i + distance] = a - b;
        }
      }
    }
    for (; distance < dim; distance *= 2) {
      for (std::size_t begin = 0; begin < dim; begin += 2 * distance) {
        for (std::size_t i = begin; i < begin + distance; i += lanes) {
          const auto a = hn::LoadU(d, x + i), b = hn::LoadU(d, x + i + distance);
          hn::StoreU(hn::Add(a, b), d, x + i);
          hn::StoreU(hn::Sub(a, b), d, x + i + distance);
        }
      }
    }
    std::size_t i = 0;
    for (; i + lanes <= dim; i += lanes) hn::StoreU(hn::Mul(hn::LoadU(d, x + i), vscale), d, x + i);
    for (; i < dim; ++i) x[i] *= scale;
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
  parallel_for(rows, kBlockElements / dim + 1,
               [&](std::size_t begin, std::size_t end) { HWY_DYNAMIC_DISPATCH(hadamard_rows)(x + begin * dim, end - begin, dim); });
}

std::vector<float> walsh_hadamard_matrix(std::size_t dim) {
  if (!is_power_of_two(dim) || dim > 65536) throw_invalid("walsh_hadamard_matrix", "expected a power of two up to 65536, got {}", dim);
  const float value = 1.0f / std::sqrt(static_cast<float>(dim));
  std::vector<float> matrix(dim * dim);
  for (std::size_t i = 0; i < dim; ++i)
    for (std::size_t j = 0; j < dim; ++j) matrix[i * dim + j] = std::popcount(i & j) % 2 == 0 ? value : -value;
  return matrix;
}

}  // namespace veloxquant
#endif
