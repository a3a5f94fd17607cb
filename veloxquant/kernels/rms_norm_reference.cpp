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

// With r = 1 / rms:  ∂/∂x = r·(g∘w) − x·r³·mean(x∘g∘w).
void rms_norm_backward(const float* x, const float* weight, const float* grad_out, float* grad_x, std::size_t rows, std::size_t dim,
                       float eps) {
  for (std::size_t r = 0; r < rows; ++r, x += dim, grad_out += dim, grad_x += dim) {
    double squares = 0, products = 0;
    for (std::size_t i = 0; i < dim; ++i) {
      squares += static_cast<double>(x[i]) * x[i];
      products += static_cast<double>(x[i]) * grad_out[i] * weight[i];
    }
    const double scale = 1 / std::sqrt(squares / static_cast<double>(dim) + eps);
    const double shrink = scale * scale * scale * products / static_cast<double>(dim);
    for (std::size_t i = 0; i < dim; ++i) grad_x[i] = static_cast<float>(scale * grad_out[i] * weight[i] - shrink * x[i]);
  }
}

}  // namespace veloxquant::reference
