// Entries of codebooks in bytes, on grids on which sums of entries are sums of bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace veloxquant {

/// So many neighbouring columns of a sub-space have one scale.
inline constexpr std::size_t kByteColumns = 8;

/// Sums of an entry of each table are at most this: they are added as bytes.
inline constexpr int kMostByteSum = 255;

/// Of an offset, and of both of a column together: up to here 1024 ± offset is a whole number in half precision.
inline constexpr int kMostByteOffset = 1000;

constexpr std::size_t byte_units(std::size_t width) {
  return (width + kByteColumns - 1) / kByteColumns;
}

/// The tables of one sub-space, of one stage or two.  Entry c of a stage reads scale · (byte − offset) in a column; the scale is
/// that of the column's unit, j / kByteColumns.  Offsets of stages are apart so that each table by itself is near what it was
/// rounded from: encoding seeks in the first before it looks at sums.
struct ByteTables {
  std::size_t width = 0;                           // columns
  std::vector<std::vector<std::uint8_t>> entries;  // of each stage [num_entries, width]
  std::vector<std::vector<float>> offsets;         // of each stage [width], whole
  std::vector<float> scales;                       // of each unit, > 0

  float scale(std::size_t column) const { return scales[column / kByteColumns]; }

  float value(std::size_t stage, std::size_t entry, std::size_t column) const {
    return scale(column) * (static_cast<float>(entries[stage][entry * width + column]) - offsets[stage][column]);
  }

  /// Of a sum of bytes of all stages.
  float offset(std::size_t column) const { return offsets[0][column] + (offsets.size() > 1 ? offsets[1][column] : 0.0f); }
};

/// Rounds tables of one stage or two [num_entries, width], finite, to the finest such grid: of both stages on one, since they are
/// added.
ByteTables round_to_bytes(std::span<const std::vector<float>> tables, std::size_t width);

}  // namespace veloxquant
