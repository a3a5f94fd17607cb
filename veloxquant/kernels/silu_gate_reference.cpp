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

}  // namespace veloxquant::reference
