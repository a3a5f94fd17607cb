// Codes of a few bits in a row of bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace veloxquant {

/// Bytes that `count` codes of `bits` bits take.
constexpr std::size_t packed_bytes(std::size_t count, int bits) {
  return (count * static_cast<std::size_t>(bits) + 7) / 8;
}

/// Writes codes < 2^bits, 1 ≤ bits ≤ 16, one after another: code i takes bits i·bits … (i + 1)·bits − 1 of the row, bit 0 being the
/// lowest of the first byte.  The last byte is filled up with zeros.  `packed` holds packed_bytes(codes.size(), bits) bytes.
void pack_bits(std::span<const std::uint16_t> codes, int bits, std::uint8_t* packed);

/// Reads them back.
void unpack_bits(const std::uint8_t* packed, int bits, std::span<std::uint16_t> codes);

}  // namespace veloxquant
