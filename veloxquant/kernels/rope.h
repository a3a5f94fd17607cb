// Rotary position embedding (RoFormer, arXiv 2104.09864), half-split: dimension i turns together with i + dim/2.
#pragma once

#include <cstddef>
#include <span>

#include "veloxquant/kernels/strided.h"

namespace veloxquant {

struct RopeShape {
  std::size_t batch, heads, tokens, head_dim;
};

/// Turns the pair (i, i + D/2) of the vector at position p = offset + token by p · frequencies[i]; frequencies [D/2], radians per
/// position.  out has the shape of x and may be x.  A gradient by out becomes one by x with
/// negative frequencies.
void rope(const RopeShape& shape, StridedView x, std::span<const float> frequencies, std::ptrdiff_t offset, MutableStridedView out);

namespace reference {
void rope(const RopeShape& shape, StridedView x, std::span<const float> frequencies, std::ptrdiff_t offset, MutableStridedView out);
}

}  // namespace veloxquant
