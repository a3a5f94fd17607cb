// Scales, offsets and norms as they are stored: IEEE half, two bytes, little-endian.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace veloxquant {

/// The nearest half-precision value; what lies beyond ±65504 becomes that, since an infinite scale would lose the whole group.
inline float round_to_half(float x) {
  return static_cast<float>(static_cast<_Float16>(std::clamp(x, -65504.0f, 65504.0f)));
}

inline void store_half(float x, std::uint8_t* bytes) {
  const auto half = static_cast<_Float16>(std::clamp(x, -65504.0f, 65504.0f));
  std::memcpy(bytes, &half, sizeof(half));
}

inline float load_half(const std::uint8_t* bytes) {
  _Float16 half;
  std::memcpy(&half, bytes, sizeof(half));
  return static_cast<float>(half);
}

}  // namespace veloxquant
