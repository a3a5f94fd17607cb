// The gate of a SwiGLU layer (arXiv 2002.05202).
#pragma once

#include <cstddef>

namespace veloxquant {

/// out[r, i] = silu(joined[r, i]) · joined[r, dim + i], silu(x) = x / (1 + e^−x), for joined [rows, 2·dim] (gate, then up) and
/// out [rows, dim].
void silu_gate_joined(const float* joined, float* out, std::size_t rows, std::size_t dim);

/// What a loss gains by joined when it gains grad_out [rows, dim] by out: grad_joined [rows, 2·dim], overlaps nothing.
void silu_gate_joined_backward(const float* joined, const float* grad_out, float* grad_joined, std::size_t rows, std::size_t dim);

namespace reference {
void silu_gate_joined(const float* joined, float* out, std::size_t rows, std::size_t dim);
void silu_gate_joined_backward(const float* joined, const float* grad_out, float* grad_joined, std::size_t rows, std::size_t dim);
}  // namespace reference

}  // namespace veloxquant
