// Rotary position embedding (RoFormer, arXiv 2104.09864), half-split: dimension i turns together with i + n, n half
// of the dimensions that turn.
#pragma once

#include <cstddef>
#include <span>

#include "veloxquant/kernels/strided.h"

namespace veloxquant {

struct RopeShape {
  std::size_t batch, heads, tokens, head_dim;
};

/// Turns the pair (i, i + n) of the vector at position p = offset + token by p · frequencies[i] and multiplies it by `magnitude`;
/// frequencies [n], radians per position, n ≤ D/2; elements from 2n on stay as they are.  out has the shape of x and may be x.  A
/// gradient by out becomes one by x with negative frequencies.
void rope(const RopeShape& shape, StridedView x, std::span<const float> frequencies, float magnitude, std::ptrdiff_t offset,
          MutableStridedView out);

namespace reference {
void rope(const RopeShape& shape, StridedView x, std::span<const float> frequencies, float magnitude, std::ptrdiff_t offset,
          MutableStridedView out);
}

}  // namespace veloxquant
