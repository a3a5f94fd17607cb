#include <limits>

#include "veloxquant/kernels/nearest_centroid.h"

namespace veloxquant::reference {

void nearest_centroid(std::span<const float> centroids, std::size_t count, std::size_t dim, const float* points, std::size_t rows,
                      std::size_t stride, std::uint16_t* codes, std::size_t code_stride, float* distances) {
  for (std::size_t r = 0; r < rows; ++r, points += stride) {
    double best = std::numeric_limits<double>::infinity();
    for (std::size_t c = 0; c < count; ++c) {
      double distance = 0;
      for (std::size_t i = 0; i < dim; ++i) {
        const double difference = static_cast<double>(points[i]) - centroids[c * dim + i];
        distance += difference * difference;
      }
      if (distance >= best) continue;
      best = distance;
      codes[r * code_stride] = static_cast<std::uint16_t>(c);
    }
    if (distances) distances[r] = static_cast<float>(best);
  }
}

}  // namespace veloxquant::reference
