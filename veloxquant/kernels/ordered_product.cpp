#include "veloxquant/kernels/ordered_product.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "veloxquant/kernels/ordered_product.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

#ifndef VELOXQUANT_ORDERED_PRODUCT_ARRAYS
#define VELOXQUANT_ORDERED_PRODUCT_ARRAYS
namespace veloxquant {
struct OrderedProduct {
  const float* x;
  std::size_t in, x_stride;
  const float* m;
  std::size_t out;
  const float* start;
  float* y;
  std::size_t y_stride;
};
}  // namespace veloxquant
#endif

HWY_BEFORE_NAMESPACE();
namespace veloxquant {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Lanes are columns, each with a chain of its own, so that how wide a vector is does not matter.  kRows · kVectors chains hide each
// other's latency.
template <std::size_t kRows, std::size_t kVectors, class D>
void multiply_tile(D d, const OrderedProduct& p, std::size_t row, std::size_t column) {
  const std::size_t lanes = hn::Lanes(d);
  const float* x[kRows];
  for (std::size_t r = 0; r < kRows; ++r) x[r] = p.x + (row + r) * p.x_stride;
  hn::Vec<D> sums[kRows][kVectors];
  for (std::size_t v = 0; v < kVectors; ++v) {
    const auto start = p.start ? hn::LoadU(d, p.start + column + v * lanes) : hn::Zero(d);
    for (std::size_t r = 0; r < kRows; ++r) sums[r][v] = start;
  }
  const float* m = p.m + column;
  for (std::size_t k = 0; k < p.in; ++k, m += p.out) {
    hn::Vec<D> factors[kVectors];
    for (std::size_t v = 0; v < kVectors; ++v) factors[v] = hn::LoadU(d, m + v * lanes);
    for (std::size_t r = 0; r < kRows; ++r) {
      const auto value = hn::Set(d, x[r][k]);
      for (std::size_t v = 0; v < kVectors; ++v) sums[r][v] = hn::MulAdd(value, factors[v], sums[r][v]);
    }
  }
  for (std::size_t r = 0; r < kRows; ++r)
    for (std::size_t v = 0; v < kVectors; ++v) hn::StoreU(sums[r][v], d, p.y + (row + r) * p.y_stride + column + v * lanes);
}

// All columns of kRows rows: whole tiles, then narrower ones.
template <std::size_t kRows, std::size_t kVectors>
void multiply_rows(const OrderedProduct& p, std::size_t row) {
  const hn::ScalableTag<float> d;
  const std::size_t lanes = hn::Lanes(d);
  std::size_t column = 0;
  for (; column + kVectors * lanes <= p.out; column += kVectors * lanes) multiply_tile<kRows, kVectors>(d, p, row, column);
  if constexpr (kVectors > 2)
    if (column + 2 * lanes <= p.out) multiply_tile<kRows, 2>(d, p, row, column), column += 2 * lanes;
  for (; column + lanes <= p.out; column += lanes) multiply_tile<kRows, 1>(d, p, row, column);
  const hn::CappedTag<float, 4> quad;
  for (; column + hn::Lanes(quad) <= p.out; column += hn::Lanes(quad)) multiply_tile<kRows, 1>(quad, p, row, column);
  for (; column < p.out; ++column) multiply_tile<kRows, 1>(hn::CappedTag<float, 1>(), p, row, column);
}

// Six rows by two vectors leave AVX2 three of its registers for what is multiplied.  Wider tiles of fewer rows have as many chains.
void multiply_all_rows(const OrderedProduct& p, std::size_t rows) {
  std::size_t row = 0;
  for (; row + 6 <= rows; row += 6) multiply_rows<6, 2>(p, row);
  for (; row + 3 <= rows; row += 3) multiply_rows<3, 4>(p, row);
  for (; row + 2 <= rows; row += 2) multiply_rows<2, 4>(p, row);
  for (; row < rows; ++row) multiply_rows<1, 8>(p, row);
}

}  // namespace HWY_NAMESPACE
}  // namespace veloxquant
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace veloxquant {

HWY_EXPORT(multiply_all_rows);

void ordered_product(const float* x, std::size_t rows, std::size_t in, std::size_t x_stride, const float* m, std::size_t out,
                     const float* start, float* y, std::size_t y_stride) {
  HWY_DYNAMIC_DISPATCH(multiply_all_rows)({x, in, x_stride, m, out, start, y, y_stride}, rows);
}

}  // namespace veloxquant
#endif
