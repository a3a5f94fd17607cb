#include "veloxquant/kernels/bit_packing.h"

#include <algorithm>

namespace veloxquant {

void pack_bits(std::span<const std::uint16_t> codes, int bits, std::uint8_t* packed) {
  std::uint32_t waiting = 0;
  int waiting_bits = 0;
  for (const std::uint16_t code : codes) {
    waiting |= static_cast<std::uint32_t>(code) << waiting_bits;
    for (waiting_bits += bits; waiting_bits >= 8; waiting_bits -= 8, waiting >>= 8) *packed++ = static_cast<std::uint8_t>(waiting);
  }
  if (waiting_bits > 0) *packed = static_cast<std::uint8_t>(waiting);
}

void unpack_bits(const std::uint8_t* packed, int bits, std::span<std::uint16_t> codes) {
  if (bits == 8) {
    std::copy_n(packed, codes.size(), codes.begin());
    return;
  }
  const std::uint32_t mask = (1u << bits) - 1;
  std::uint32_t waiting = 0;
  int waiting_bits = 0;
  for (std::uint16_t& code : codes) {
    for (; waiting_bits < bits; waiting_bits += 8) waiting |= static_cast<std::uint32_t>(*packed++) << waiting_bits;
    code = static_cast<std::uint16_t>(waiting & mask);
    waiting >>= bits;
    waiting_bits -= bits;
  }
}

}  // namespace veloxquant
