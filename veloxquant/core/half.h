// The 16-bit floating-point types of files, as bits.
#pragma once

#include <bit>
#include <cstdint>

namespace veloxquant {

/// IEEE 754 binary16.
inline float from_half(std::uint16_t bits) {
  return static_cast<float>(std::bit_cast<_Float16>(bits));
}

/// The upper half of a float32.
inline float from_bfloat(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

}  // namespace veloxquant
