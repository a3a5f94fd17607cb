// The inner loop of additive quantisation: which two codewords have the sum that is nearest.
#pragma once

#include <cstddef>
#include <cstdint>

namespace veloxquant {

struct CodePair {
  std::uint16_t first, second;
};

/// Indices i, j of least first[i] + second[j] + cross[i, j]: with first[i] = ½|a_i|² − x·a_i, second[j] = ½|b_j|² − x·b_j and
/// cross[i, j] = a_i·b_j that is the pair whose sum a_i + b_j is nearest to x.  Looks at the `beam` smallest first[i] and all j for
/// each; of equal sums at the one found first.  first and second [count], cross [count, count], all finite; 1 ≤ beam ≤ count ≤
/// 65,536.  `first` is scratch afterwards.
CodePair nearest_pair(float* first, const float* second, const float* cross, std::size_t count, std::size_t beam);

namespace reference {
CodePair nearest_pair(const float* first, const float* second, const float* cross, std::size_t count, std::size_t beam);
}

}  // namespace veloxquant
