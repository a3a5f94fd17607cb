// The inner loop of product quantisation: which centroid is nearest.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace veloxquant {

/// Finds nearest centroids by argmin ½|c|² − x·c, which needs no |x|².  That difference cancels where data lie far from the origin
/// compared with their spread, as keys with a bias do; so points and centroids are shifted towards it, by a power of two's multiple
/// that leaves their digits as they are.
class NearestCentroid {
 public:
  /// centroids [count, dim], finite; 1 ≤ count ≤ 65,536.  Copies them.
  NearestCentroid(std::span<const float> centroids, std::size_t count, std::size_t dim);

  /// points: rows of dim floats `stride` apart → codes[i · code_stride], the index of the nearest centroid of point i (squared
  /// Euclidean distance; of equal ones the lowest), and its squared distance if `distances` is not null.  Runs on the calling
  /// thread.
  void operator()(const float* points, std::size_t rows, std::size_t stride, std::uint16_t* codes, std::size_t code_stride,
                  float* distances) const;

 private:
  std::size_t count_, dim_;
  std::vector<float> shift_;  // [dim]
  std::vector<float> runs_;  // centroids − shift, 16 beside each other, [⌈count / 16⌉, dim, 16]; filled up with infinitely far ones
  std::vector<float> half_norms_;  // [⌈count / 16⌉, 16]
};

namespace reference {
void nearest_centroid(std::span<const float> centroids, std::size_t count, std::size_t dim, const float* points, std::size_t rows,
                      std::size_t stride, std::uint16_t* codes, std::size_t code_stride, float* distances);
}

}  // namespace veloxquant
