// Random numbers that are the same on every compiler, machine and number of threads.
#pragma once

#include <cmath>
#include <cstdint>
#include <numbers>

namespace veloxquant {

/// SplitMix64 (Steele, Lea and Flood 2014).  Different (seed, stream) pairs give independent sequences, so that parallel work
/// takes a stream per item and does not depend on the order in which items run.
class Random {
 public:
  explicit Random(std::uint64_t seed, std::uint64_t stream = 0) : state_(mix(seed + kGolden) ^ mix(mix(stream) + kGolden)) {}

  std::uint64_t next() { return mix(state_ += kGolden); }

  /// Uniform in [0, 1).
  double uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }

  /// Uniform in {0, …, n − 1}; n must not be 0.
  std::uint64_t below(std::uint64_t n) { return static_cast<std::uint64_t>((static_cast<unsigned __int128>(next()) * n) >> 64); }

  /// Standard normal (Box and Muller 1958).
  double normal() {
    const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform()));
    return radius * std::cos(2.0 * std::numbers::pi * uniform());
  }

 private:
  static constexpr std::uint64_t kGolden = 0x9e3779b97f4a7c15;

  static std::uint64_t mix(std::uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }

  std::uint64_t state_;
};

}  // namespace veloxquant
