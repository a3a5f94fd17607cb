#include <cmath>

#include "veloxquant/kernels/silu_gate.h"

namespace veloxquant::reference {

void silu_gate_joined(const float* joined, float* out, std::size_t rows, std::size_t dim) {
  for (std::size_t r = 0; r < rows; ++r) {
    for (std::size_t i = 0; i < dim; ++i) {
      const double gate = joined[2 * r * dim + i], up = joined[(2 * r + 1) * dim + i];
      out[r * dim + i] = static_cast<float>(gate / (1 + std::exp(-gate)) * up);
    }
  }
}

// With σ the logistic function:  ∂silu(x)/∂x = σ(x)·(1 + x·(1 − σ(x))).
void silu_gate_joined_backward(const float* joined, const float* grad_out, float* grad_joined, std::size_t rows, std::size_t dim) {
  for (std::size_t r = 0; r < rows; ++r) {
    for (std::size_t i = 0; i < dim; ++i) {
      const std::size_t gate_at = 2 * r * dim + i, up_at = gate_at + dim;
      const double gate = joined[gate_at], sigmoid = 1 / (1 + std::exp(-gate)), gained = grad_out[r * dim + i];
      grad_joined[gate_at] = static_cast<float>(gained * joined[up_at] * sigmoid * (1 + gate * (1 - sigmoid)));
      grad_joined[up_at] = static_cast<float>(gained * gate * sigmoid);
    }
  }
}

}  // namespace veloxquant::reference
