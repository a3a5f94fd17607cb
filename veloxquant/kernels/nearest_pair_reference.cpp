#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "veloxquant/kernels/nearest_pair.h"

namespace veloxquant::reference {

CodePair nearest_pair(const float* first, const float* second, const float* cross, std::size_t count, std::size_t beam) {
  std::vector<std::size_t> order(count);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return first[a] < first[b]; });
  CodePair best{};
  float least = std::numeric_limits<float>::infinity();
  for (std::size_t k = 0; k < beam; ++k) {
    const std::size_t i = order[k];
    for (std::size_t j = 0; j < count; ++j) {
      const float sum = first[i] + (second[j] + cross[i * count + j]);
      if (sum < least) {
        least = sum;
        best = {static_cast<std::uint16_t>(i), static_cast<std::uint16_t>(j)};
      }
    }
  }
  return best;
}

}  // namespace veloxquant::reference
