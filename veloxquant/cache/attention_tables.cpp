#include "veloxquant/cache/attention_tables.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "veloxquant/quantize/folded_planes.h"
#include "veloxquant/quantize/half.h"

namespace veloxquant {
namespace {

constexpr std::size_t kStages = 2;
static_assert(kUnitDims == kByteColumns);

std::uint16_t half_bits_of(float x) {
  std::uint8_t bytes[2];
  store_half(x, bytes);
  return static_cast<std::uint16_t>(bytes[0] | bytes[1] << 8);
}

// Columns begin … end − 1 of a sub-space's tables: what has one scale.
struct Columns {
  const ByteTables& tables;
  std::size_t begin, end;

  std::size_t count() const { return end - begin; }
  float scale() const { return tables.scale(begin); }
  float offset(std::size_t column) const { return tables.offset(begin + column); }

  // To unit `unit` of tables [256, 2, units, 8].
  void copy(std::size_t unit, std::size_t units, std::vector<std::uint8_t>& to) const {
    for (std::size_t stage = 0; stage < tables.entries.size(); ++stage)
      for (std::size_t entry = 0; entry * tables.width < tables.entries[stage].size(); ++entry)
        std::copy_n(tables.entries[stage].begin() + static_cast<std::ptrdiff_t>(entry * tables.width + begin), count(),
                    to.begin() + static_cast<std::ptrdiff_t>(((entry * kStages + stage) * units + unit) * kUnitDims));
  }
};

// add(columns) for each unit of a sub-space.
template <class Add>
void each_unit(const ByteTables& tables, Add add) {
  for (std::size_t begin = 0; begin < tables.width; begin += kUnitDims)
    add(Columns{tables, begin, std::min(begin + kUnitDims, tables.width)});
}

void set_codes(int (&codes)[2], std::size_t first, std::size_t stages) {
  codes[0] = static_cast<int>(first);
  codes[1] = static_cast<int>(first + stages - 1);
}

// add(sub-space's first code, its stages, the first column of the rotated space, the unit's columns) for each unit.
template <class Add>
void each_unit(const RotatedPqQuantizer& quantizer, Add add) {
  std::size_t column = 0, code = 0;
  for (const auto& tables : quantizer.byte_tables()) {
    each_unit(tables, [&](const Columns& columns) { add(code, tables.entries.size(), column + columns.begin, columns); });
    column += tables.width, code += tables.entries.size();
  }
}

KeyUnit no_keys() {
  KeyUnit none{};
  std::fill_n(none.columns, kUnitDims, -1);
  std::fill_n(none.offsets, kUnitDims, half_bits_of(1024));
  return none;
}

// Both x of two planes, then both y: where the offset of dimension i of a unit stands.
std::size_t offset_place(std::size_t i) {
  return i / 4 * 4 + i % 2 * 2 + i / 2 % 2;
}

}  // namespace

std::uint32_t turns_of(float radians) {
  const double turns = static_cast<double>(radians) / (2 * std::numbers::pi);
  return static_cast<std::uint32_t>(std::llround((turns - std::floor(turns)) * 0x1p32));
}

std::size_t rest_columns(const RotatedPqQuantizer& keys, const Rope& rope) {
  const std::size_t turned = 2 * rope.frequencies().size();
  if (turned != 0 && turned != static_cast<std::size_t>(keys.dim())) return 0;
  std::size_t most = 0;
  for (const auto& subspace : folded_planes(keys)) most = std::max(most, byte_units(2 * subspace.planes.size()) * kUnitDims);
  return most;
}

std::size_t num_units(const RotatedPqQuantizer& quantizer) {
  std::size_t units = 0;
  for (const auto& tables : quantizer.byte_tables()) units += tables.scales.size();
  return units;
}

KeyTables key_tables(const RotatedPqQuantizer& keys, const Rope& rope, std::size_t units, std::size_t rest_columns) {
  KeyTables made{
      std::vector<std::uint8_t>(kEntries * kStages * units * kUnitDims), {}, std::vector<float>(units * kUnitDims * rest_columns)};
  for (const auto& subspace : folded_planes(keys)) {
    const std::size_t width = 2 * subspace.planes.size();
    each_unit(*subspace.tables, [&](const Columns& columns) {
      const std::size_t at = made.units.size();
      KeyUnit unit = no_keys();
      columns.copy(at, units, made.tables);
      set_codes(unit.codes, subspace.first_code, subspace.tables->entries.size());
      unit.scale = columns.scale();
      unit.rest_begin = static_cast<int>(subspace.column);
      unit.rest_count = static_cast<int>(width);
      for (std::size_t i = 0; i < columns.count(); ++i) {
        const std::size_t plane = subspace.planes[(columns.begin + i) / 2], dim = static_cast<std::size_t>(keys.dim());
        unit.columns[i] = static_cast<int>(i % 2 == 0 ? plane : plane + dim / 2);
        unit.turns[i / 2] = rope.frequencies().empty() ? 0 : turns_of(rope.frequencies()[plane]);
        unit.offsets[offset_place(i)] = half_bits_of(1024 + columns.offset(i));
        for (std::size_t j = 0; j < width; ++j)
          made.rests[(at * kUnitDims + i) * rest_columns + j] = subspace.inverse[j * width + columns.begin + i] / unit.scale;
      }
      made.units.push_back(unit);
    });
  }
  made.units.resize(units, no_keys());
  return made;
}

KeyTables rotated_key_tables(const RotatedPqQuantizer& keys, std::size_t units) {
  KeyTables made{std::vector<std::uint8_t>(kEntries * kStages * units * kUnitDims), {}, {}};
  each_unit(keys, [&](std::size_t code, std::size_t stages, std::size_t column, const Columns& columns) {
    KeyUnit unit = no_keys();
    columns.copy(made.units.size(), units, made.tables);
    set_codes(unit.codes, code, stages);
    unit.scale = columns.scale();
    unit.rest_begin = static_cast<int>(column);
    unit.rest_count = static_cast<int>(columns.count());
    for (std::size_t i = 0; i < columns.count(); ++i) unit.offsets[offset_place(i)] = half_bits_of(1024 + columns.offset(i));
    made.units.push_back(unit);
  });
  made.units.resize(units, no_keys());
  return made;
}

float key_offset(const KeyUnit& unit, std::size_t i) {
  const std::uint16_t bits = unit.offsets[offset_place(i)];
  const std::uint8_t bytes[2] = {static_cast<std::uint8_t>(bits), static_cast<std::uint8_t>(bits >> 8)};
  return load_half(bytes) - 1024;
}

KeyPlaces key_places(int dim, const Rope& rope) {
  KeyPlaces places;
  const int turned = static_cast<int>(rope.frequencies().size());
  for (int plane = 0; plane < dim / 2; ++plane) {
    const bool turns = plane < turned;
    places.columns.push_back(turns ? plane : 2 * plane);
    places.columns.push_back(turns ? plane + turned : 2 * plane + 1);
    places.turns.push_back(turns ? turns_of(rope.frequencies()[static_cast<std::size_t>(plane)]) : 0);
  }
  return places;
}

std::vector<std::uint16_t> inverse_fragments(const RotatedPqQuantizer& keys, const std::vector<KeyUnit>& units,
                                             const KeyPlaces& places) {
  const auto dim = static_cast<std::size_t>(keys.dim());
  std::vector<std::uint16_t> fragments;
  for (std::size_t product = 0; product < dim / 8; ++product)
    for (std::size_t half_unit = 0; half_unit < units.size() / 2; ++half_unit)
      for (std::size_t lane = 0; lane < 32; ++lane) {
        const KeyUnit& unit = units[half_unit / 2 * 4 + lane % 4];
        const auto to = static_cast<std::size_t>(places.columns[8 * product + lane / 4]);
        for (const std::size_t i : {0, 2, 1, 3}) {
          const std::size_t of_unit = half_unit % 2 * 4 + i;
          const bool here = of_unit < static_cast<std::size_t>(unit.rest_count);
          fragments.push_back(half_bits_of(
              here ? unit.scale * keys.inverse()[(static_cast<std::size_t>(unit.rest_begin) + of_unit) * dim + to] : 0.0f));
        }
      }
  return fragments;
}

ValueTables value_tables(const RotatedPqQuantizer& values, std::size_t units) {
  ValueTables made{std::vector<std::uint8_t>(kEntries * kStages * units * kUnitDims), {}};
  each_unit(values, [&](std::size_t code, std::size_t stages, std::size_t column, const Columns& columns) {
    ValueUnit unit{};
    columns.copy(made.units.size(), units, made.tables);
    set_codes(unit.codes, code, stages);
    unit.scale = columns.scale();
    unit.column = static_cast<int>(column);
    unit.width = static_cast<int>(columns.count());
    for (std::size_t i = 0; i < columns.count(); ++i) unit.low[i] = -columns.offset(i) * unit.scale;
    made.units.push_back(unit);
  });
  made.units.resize(units, ValueUnit{});
  return made;
}

}  // namespace veloxquant
