// The gate of a gated MLP (arXiv 2002.05202).
#pragma once

#include <cstddef>

namespace veloxquant {

/// Both are x·σ(a(x)), with σ the logistic function.
enum class Activation {
  kSilu,  // a(x) = x
  kGelu,  // a(x) = 2·√(2/π)·(x + 0.044715·x³): the tanh approximation of GELU (arXiv 1606.08415)
};

/// out[r, i] = activation(joined[r, i]) · joined[r, dim + i] for joined [rows, 2·dim] (gate, then up) and out [rows, dim].
void gate_joined(Activation activation, const float* joined, float* out, std::size_t rows, std::size_t dim);

/// What a loss gains by joined when it gains grad_out [rows, dim] by out: grad_joined [rows, 2·dim], overlaps nothing.
void gate_joined_backward(Activation activation, const float* joined, const float* grad_out, float* grad_joined, std::size_t rows,
                          std::size_t dim);

namespace reference {
void gate_joined(Activation activation, const float* joined, float* out, std::size_t rows, std::size_t dim);
void gate_joined_backward(Activation activation, const float* joined, const float* grad_out, float* grad_joined, std::size_t rows,
                          std::size_t dim);
}  // namespace reference

}  // namespace veloxquant
