// Keys of rotated_pq whose sub-spaces hold whole planes of RoPE: entries that are pieces of a key at once.
#pragma once

#include <cstddef>
#include <vector>

#include "veloxquant/quantize/rotated_pq.h"

namespace veloxquant {

/// A sub-space whose tables have A⁻¹ and μ in them: the sum of an entry of each gives, for each of its planes i, the dimensions i and
/// i + dim/2 of a key before RoPE.
struct FoldedSubspace {
  std::size_t first_code, column;  // its first code; its first column of the rotated space, of 2 · planes
  std::vector<std::size_t> planes;
  const ByteTables* tables;    // the quantizer's
  std::vector<float> inverse;  // [2 · planes, 2 · planes]: what a column of the rotated space adds to each dimension
};

/// In the order of the columns; none of a quantizer of Rotation::kFull.  `quantizer` outlives them.
std::vector<FoldedSubspace> folded_planes(const RotatedPqQuantizer& quantizer);

}  // namespace veloxquant
