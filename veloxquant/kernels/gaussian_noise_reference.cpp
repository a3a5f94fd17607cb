#include <cmath>
#include <numbers>

#include "veloxquant/kernels/gaussian_noise.h"

namespace veloxquant::reference {
namespace {

std::uint32_t finalise(std::uint32_t h) {
  h ^= h >> 16;
  h *= 0x85EBCA6B;
  h ^= h >> 13;
  h *= 0xC2B2AE35;
  return h ^ (h >> 16);
}

}  // namespace

void add_gaussian_noise(const float* x, std::size_t count, float deviation, std::uint64_t seed, float* out) {
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint32_t place = static_cast<std::uint32_t>(i) * kNoiseStride;
    const std::uint32_t first = finalise(place + noise_salt(seed, 1)), second = finalise(place + noise_salt(seed, 2));
    const double radius = std::sqrt(-2 * std::log(((first >> 8) + 0.5) * 0x1p-24));
    out[i] = static_cast<float>(x[i] + deviation * radius * std::cos(2 * std::numbers::pi * 0x1p-32 * second));
  }
}

}  // namespace veloxquant::reference
