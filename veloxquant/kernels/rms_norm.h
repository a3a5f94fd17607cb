// Root mean square normalisation (arXiv 1910.07467).
#pragma once

#include <cstddef>

namespace veloxquant {

/// out[r] = x[r] / √(mean(x[r]²) + eps) · weight for rows of x [rows, dim]; weight [dim]; out [rows, dim], may be x.
void rms_norm(const float* x, const float* weight, float* out, std::size_t rows, std::size_t dim, float eps);

/// What a loss gains by x when it gains grad_out by out: grad_x [rows, dim], may be grad_out.
void rms_norm_backward(const float* x, const float* weight, const float* grad_out, float* grad_x, std::size_t rows, std::size_t dim,
                       float eps);

namespace reference {
void rms_norm(const float* x, const float* weight, float* out, std::size_t rows, std::size_t dim, float eps);
void rms_norm_backward(const float* x, const float* weight, const float* grad_out, float* grad_x, std::size_t rows, std::size_t dim,
                       float eps);
}  // namespace reference

}  // namespace veloxquant
