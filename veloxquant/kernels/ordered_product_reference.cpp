#include <cmath>

#include "veloxquant/kernels/ordered_product.h"

namespace veloxquant::reference {

// Not in double precision, as other references are: the order and the rounding are the contract.
void ordered_product(const float* x, std::size_t rows, std::size_t in, std::size_t x_stride, const float* m, std::size_t out,
                     const float* start, float* y, std::size_t y_stride) {
  for (std::size_t r = 0; r < rows; ++r)
    for (std::size_t j = 0; j < out; ++j) {
      float sum = start ? start[j] : 0.0f;
      for (std::size_t k = 0; k < in; ++k) sum = std::fma(x[r * x_stride + k], m[k * out + j], sum);
      y[r * y_stride + j] = sum;
    }
}

}  // namespace veloxquant::reference
