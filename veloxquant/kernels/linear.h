// Linear maps of activations, several of the same input at once.
#pragma once

#include <cstddef>
#include <span>

#include "veloxquant/kernels/stored_matrix.h"

namespace veloxquant {

/// One map: weight [out, in] as checkpoints hold it, bias [out] or null.
struct LinearMap {
  StoredMatrix weight;
  const float* bias;
  std::size_t out;
};

/// y = x·Wᵀ + b, the maps' outputs beside each other: x [rows, in] → y [rows, Σ out].  residual [rows, Σ out] or null is added.
/// y overlaps nothing.  The maps share their input, so that it is read once.
///
/// Of few rows, as in decoding, weights are restored to float32 in registers; many rows restore a piece of them at a time, which
/// costs about a hundredth of its product.  Throws std::invalid_argument for a weight that cannot have `in` columns.
void linear(const float* x, std::size_t rows, std::size_t in, std::span<const LinearMap> maps, const float* residual, float* y);

/// What a loss gains by x when it gains grad_y [rows, Σ out] by y: grad_x [rows, in] = Σ grad_y·W; overlaps nothing.
void linear_backward(const float* grad_y, std::size_t rows, std::size_t in, std::span<const LinearMap> maps, float* grad_x);

namespace reference {
void linear(const float* x, std::size_t rows, std::size_t in, std::span<const LinearMap> maps, const float* residual, float* y);
void linear_backward(const float* grad_y, std::size_t rows, std::size_t in, std::span<const LinearMap> maps, float* grad_x);
}  // namespace reference

}  // namespace veloxquant
