// Codebooks as attention on a GPU reads them: entries of bytes, in units of eight dimensions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "veloxquant/kernels/cuda/packed_units.h"
#include "veloxquant/model/rope.h"
#include "veloxquant/quantize/rotated_pq.h"

namespace veloxquant {

/// Those of quantize/byte_tables.h, in the order of kernels.
/// tables [256, 2, units, 8]: of both stages; sums of two entries are at most 255.
struct KeyTables {
  std::vector<std::uint8_t> tables;
  std::vector<KeyUnit> units;
  std::vector<float> rests;  // [units, 8, rest_columns]: what a column of a patch adds to each dimension, by the unit's scale
};

struct ValueTables {
  std::vector<std::uint8_t> tables;
  std::vector<ValueUnit> units;
};

/// The dimensions of keys in the order in which kernels turn them: x and y of plane i are places 2i and 2i + 1.  Dimensions that do
/// not turn are planes too.
struct KeyPlaces {
  std::vector<int> columns;          // [dim]
  std::vector<std::uint32_t> turns;  // [dim / 2]
};

/// dim even, and at least what the rope turns.
KeyPlaces key_places(int dim, const Rope& rope);

/// Columns that a unit's patches are made of, at most, filled up to a multiple of 8; 0 where keys do not consist of planes that
/// `rope` turns one by one, or not at all: then there are no tables for them.
std::size_t rest_columns(const RotatedPqQuantizer& keys, const Rope& rope);

/// As many units as there are of keys or values, without filling up.
std::size_t num_units(const RotatedPqQuantizer& quantizer);

/// Filled up to `units` that add nothing.
KeyTables key_tables(const RotatedPqQuantizer& keys, const Rope& rope, std::size_t units, std::size_t rest_columns);
/// Of keys of Rotation::kFull: units of the rotated space, whose rest_begin and rest_count are its columns.
KeyTables rotated_key_tables(const RotatedPqQuantizer& keys, std::size_t units);

/// What is taken from the sum of the bytes of dimension i of a unit.
float key_offset(const KeyUnit& unit, std::size_t i);

/// A⁻¹ for these units as lanes of a product on tensor cores take it (FullKeyTables in packed_tiles.cuh), IEEE half:
/// [dim / 8, units / 2, 32, 4].
std::vector<std::uint16_t> inverse_fragments(const RotatedPqQuantizer& keys, const std::vector<KeyUnit>& units,
                                             const KeyPlaces& places);
ValueTables value_tables(const RotatedPqQuantizer& values, std::size_t units);

/// Radians a position as fractions of a circle, of 2³².
std::uint32_t turns_of(float radians);

}  // namespace veloxquant
