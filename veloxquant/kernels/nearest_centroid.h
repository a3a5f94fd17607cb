// The inner loop of product quantisation: which centroid is nearest.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace veloxquant {

/// Finds nearest centroids by argmin ½|c|² − x·c, which needs no |x|².  Centroids are kept transposed, so that the lanes of a vector
/// hold different centroids and a point needs no sum over lanes until its end.
class NearestCentroid {
 public:
  /// centroids [count, dim], finite; 1 ≤ count ≤ 65,536.  Copies them.
  NearestCentroid(std::span<const float> centroids, std::size_t count, std::size_t dim);

  /// points: rows of dim floats `stride` apart → codes[i · code_stride], the index of the nearest centroid of point i (squared Euclidean
  /// distance; of equal ones the lowest), and its squared distance if `distances` is not null.  Runs on the calling thread.
  void operator()(const float* points, std::size_t rows, std::size_t stride, std::uint16_t* codes, std::size_t code_stride,
                  float* distances) const;

 private:
  std::size_t dim_, padded_;      // centroids, filled up to whole blocks with ones that are infinitely far
  std::vector<float> transposed_;  // [dim, padded]
  std::vector<float> half_norms_;  // [padded]
};

namespace reference {
void nearest_centroid(std::span<const float> centroids, std::size_t count, std::size_t dim, const float* points, std::size_t rows,
                      std::size_t stride, std::uint16_t* codes, std::size_t code_stride, float* distances);
}

}  // namespace veloxquant
