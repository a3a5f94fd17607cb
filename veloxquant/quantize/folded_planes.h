// Keys of rotated_pq whose sub-spaces hold whole planes of RoPE: entries that are pieces of a key at once.
#pragma once

#include <cstddef>
#include <vector>

#include "veloxquant/quantize/rotated_pq.h"

namespace veloxquant {

/// A sub-space, with A⁻¹ and μ in its tables: the sum of an entry of each gives, for each of its planes i, the dimensions i and
/// i + dim/2 of a key before RoPE.
struct FoldedSubspace {
  std::size_t first_code, column;  // its first code; its first column of the rotated space, of 2 · planes
  std::vector<std::size_t> planes;
  std::vector<std::vector<float>> tables;  // of each stage [num_centroids, 2 · planes], μ in the first
  std::vector<float> inverse;              // [2 · planes, 2 · planes]: what a column of the rotated space adds to each dimension
};

/// In the order of the columns; none where a sub-space holds half a plane, or mixes planes with those of another.
std::vector<FoldedSubspace> folded_planes(const RotatedPqQuantizer& quantizer);

}  // namespace veloxquant
