// Vectors that the tests of quantizers share.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "veloxquant/core/random.h"
#include "veloxquant/quantize/registry.h"

namespace veloxquant::testing {

/// Values of a head: Gaussian [tokens, dim].
inline std::vector<float> gaussian(std::size_t tokens, std::size_t dim, std::uint64_t seed = 1) {
  Random random(seed);
  std::vector<float> vectors(tokens * dim);
  for (auto& value : vectors) value = static_cast<float>(random.normal());
  return vectors;
}

/// Keys as models have them: some channels large, one with a bias, one dead.
inline std::vector<float> keys(std::size_t tokens, std::size_t dim, std::uint64_t seed = 1) {
  auto vectors = gaussian(tokens, dim, seed);
  for (std::size_t i = 0; i < vectors.size(); ++i) {
    const std::size_t channel = i % dim;
    if (channel % 16 == 3) vectors[i] *= 12;
    if (channel == 5) vectors[i] += 30;
    if (channel == 7) vectors[i] = 0;
  }
  return vectors;
}

inline std::vector<std::uint8_t> encoded(const Quantizer& quantizer, std::span<const float> vectors) {
  std::vector<std::uint8_t> bytes(quantizer.encoded_bytes(vectors.size() / static_cast<std::size_t>(quantizer.dim())));
  quantizer.encode(vectors, bytes);
  return bytes;
}

inline std::vector<float> restored(const Quantizer& quantizer, std::span<const float> vectors) {
  std::vector<float> result(vectors.size());
  quantizer.restore(vectors, result);
  return result;
}

/// Mean squared error relative to the mean square.
inline double relative_error(std::span<const float> vectors, std::span<const float> restored) {
  double error = 0, power = 0;
  for (std::size_t i = 0; i < vectors.size(); ++i) {
    error += (static_cast<double>(vectors[i]) - restored[i]) * (static_cast<double>(vectors[i]) - restored[i]);
    power += static_cast<double>(vectors[i]) * vectors[i];
  }
  return error / power;
}

}  // namespace veloxquant::testing
