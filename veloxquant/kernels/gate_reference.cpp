#include <cmath>
#include <numbers>

#include "veloxquant/kernels/gate.h"

namespace veloxquant::reference {
namespace {

// a(x) and its slope.
struct Argument {
  double value, slope;
};

Argument argument(Activation activation, double x) {
  if (activation == Activation::kSilu) return {x, 1};
  const double scale = 2 * std::sqrt(2 / std::numbers::pi);
  return {scale * (x + 0.044715 * x * x * x), scale * (1 + 3 * 0.044715 * x * x)};
}

double sigmoid(double x) {
  return 1 / (1 + std::exp(-x));
}

}  // namespace

void gate_joined(Activation activation, const float* joined, float* out, std::size_t rows, std::size_t dim) {
  for (std::size_t r = 0; r < rows; ++r) {
    for (std::size_t i = 0; i < dim; ++i) {
      const double gate = joined[2 * r * dim + i], up = joined[(2 * r + 1) * dim + i];
      out[r * dim + i] = static_cast<float>(gate * sigmoid(argument(activation, gate).value) * up);
    }
  }
}

// ∂ x·σ(a(x)) / ∂x = σ(a)·(1 + x·a'·(1 − σ(a))).
void gate_joined_backward(Activation activation, const float* joined, const float* grad_out, float* grad_joined, std::size_t rows,
                          std::size_t dim) {
  for (std::size_t r = 0; r < rows; ++r) {
    for (std::size_t i = 0; i < dim; ++i) {
      const std::size_t gate_at = 2 * r * dim + i, up_at = gate_at + dim;
      const double gate = joined[gate_at], gained = grad_out[r * dim + i];
      const auto [a, slope] = argument(activation, gate);
      const double s = sigmoid(a), rest = sigmoid(-a);
      grad_joined[gate_at] = static_cast<float>(gained * joined[up_at] * s * (1 + (rest > 0 ? gate * slope * rest : 0)));
      grad_joined[up_at] = static_cast<float>(gained * gate * s);
    }
  }
}

}  // namespace veloxquant::reference
