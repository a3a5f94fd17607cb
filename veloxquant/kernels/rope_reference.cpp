#include <cmath>

#include "veloxquant/kernels/rope.h"

namespace veloxquant::reference {

void rope(const RopeShape& shape, StridedView x, std::span<const float> frequencies, float magnitude, std::ptrdiff_t offset,
          MutableStridedView out) {
  const std::size_t half = frequencies.size();
  for (std::size_t b = 0; b < shape.batch; ++b) {
    for (std::size_t h = 0; h < shape.heads; ++h) {
      for (std::size_t t = 0; t < shape.tokens; ++t) {
        const float* in = x.at(b, h, t);
        float* result = out.at(b, h, t);
        for (std::size_t i = 0; i < half; ++i) {
          const double angle = static_cast<double>(offset + static_cast<std::ptrdiff_t>(t)) * frequencies[i];
          const double first = in[i], second = in[i + half];
          result[i] = static_cast<float>(magnitude * (first * std::cos(angle) - second * std::sin(angle)));
          result[i + half] = static_cast<float>(magnitude * (first * std::sin(angle) + second * std::cos(angle)));
        }
        for (std::size_t i = 2 * half; i < shape.head_dim; ++i) result[i] = in[i];
      }
    }
  }
}

}  // namespace veloxquant::reference
