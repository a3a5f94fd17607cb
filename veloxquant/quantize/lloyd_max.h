// The best scalar levels for Gaussian data.
#pragma once

#include <vector>

namespace veloxquant {

/// Levels, ascending and symmetric, and the boundaries half-way between neighbours, of the quantizer of least mean squared error
/// for the standard normal distribution (Lloyd 1982, Max 1960): the fixed point of its closed form, by Newton's method.
struct LloydMax {
  std::vector<float> levels;      // [2^bits]
  std::vector<float> boundaries;  // [2^bits − 1]
  double distortion;              // mean squared error for variance 1
};

/// 1 ≤ bits ≤ 8; computed once.
const LloydMax& lloyd_max(int bits);

}  // namespace veloxquant
