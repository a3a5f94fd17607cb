#include <cmath>

#include "veloxquant/kernels/rms_norm.h"

namespace veloxquant::reference {

void rms_norm(const float* x, const float* weight, float* out, std::size_t rows, std::size_t dim, float eps) {
  for (std::size_t r = 0; r < rows; ++r, x += dim, out += dim) {
    double squares = 0;
    for (std::size_t i = 0; i < dim; ++i) squares += static_cast<double>(x[i]) * x[i];
    const double scale = 1 / std::sqrt(squares / static_cast<double>(dim) + eps);
    for (std::size_t i = 0; i < dim; ++i) out[i] = static_cast<float>(x[i] * scale * weight[i]);
  }
}

}  // namespace veloxquant::reference
