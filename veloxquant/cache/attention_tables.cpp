#include "veloxquant/cache/attention_tables.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "veloxquant/quantize/folded_planes.h"
#include "veloxquant/quantize/half.h"

namespace veloxquant {
namespace {

constexpr std::size_t kStages = 2;
constexpr float kSteps = 253;        // two roundings less than a byte holds
constexpr float kMostOffset = 1000;  // 1024 ± offset are whole numbers in half precision

std::size_t units_of(std::size_t width) {
  return (width + kUnitDims - 1) / kUnitDims;
}

std::uint16_t half_bits_of(float x) {
  std::uint8_t bytes[2];
  store_half(x, bytes);
  return static_cast<std::uint16_t>(bytes[0] | bytes[1] << 8);
}

// Columns begin … end of tables [entries, width], of one stage or two.
struct Columns {
  const std::vector<std::vector<float>>& tables;
  std::size_t width, begin, end;

  std::size_t count() const { return end - begin; }
  float at(std::size_t stage, std::size_t entry, std::size_t column) const { return tables[stage][entry * width + begin + column]; }
};

struct Rounded {
  float scale;
  std::vector<float> offsets;  // of each column: a sum of bytes less its offset, by scale, is a sum of entries
};

// Writes the bytes of a unit's entries to tables [256, 2, units, 8].
Rounded round_entries(const Columns& columns, std::size_t unit, std::size_t units, std::vector<std::uint8_t>& tables) {
  const std::size_t stages = columns.tables.size(), entries = columns.tables[0].size() / columns.width;
  std::vector<std::vector<float>> lows(stages);
  std::vector<float> low_sums;
  Rounded rounded{1e-30f, {}};
  for (std::size_t column = 0; column < columns.count(); ++column) {
    float range = 0, low_sum = 0;
    for (std::size_t stage = 0; stage < stages; ++stage) {
      float low = columns.at(stage, 0, column), high = low;
      for (std::size_t entry = 1; entry < entries; ++entry) {
        low = std::min(low, columns.at(stage, entry, column));
        high = std::max(high, columns.at(stage, entry, column));
      }
      lows[stage].push_back(low);
      range += high - low, low_sum += low;
    }
    low_sums.push_back(low_sum);
    rounded.scale = std::max({rounded.scale, range / kSteps, std::abs(low_sum) / kMostOffset});
  }
  for (std::size_t column = 0; column < columns.count(); ++column) {
    rounded.offsets.push_back(std::ceil(-low_sums[column] / rounded.scale));
    // Offsets are whole: the first table's low end gives way, by less than a step.
    lows[0][column] -= low_sums[column] + rounded.offsets[column] * rounded.scale;
    for (std::size_t stage = 0; stage < stages; ++stage)
      for (std::size_t entry = 0; entry < entries; ++entry)
        tables[((entry * kStages + stage) * units + unit) * kUnitDims + column] = static_cast<std::uint8_t>(
            std::clamp(std::lround((columns.at(stage, entry, column) - lows[stage][column]) / rounded.scale), 0L, 255L));
  }
  return rounded;
}

void set_codes(int (&codes)[2], std::size_t first, std::size_t stages) {
  codes[0] = static_cast<int>(first);
  codes[1] = static_cast<int>(first + stages - 1);
}

// add(sub-space's first code, its stages, the first column of the rotated space, how entries are rounded) for each unit.
template <class Add>
void round_units(const RotatedPqQuantizer& quantizer, std::size_t units, std::vector<std::uint8_t>& bytes, Add add) {
  std::size_t column = 0, code = 0, unit = 0;
  for (const auto& subspace : quantizer.subspaces()) {
    const auto width = static_cast<std::size_t>(subspace.dim()), stages = static_cast<std::size_t>(subspace.stages()),
               size = static_cast<std::size_t>(subspace.num_centroids()) * width;
    std::vector<std::vector<float>> tables;
    for (std::size_t stage = 0; stage < stages; ++stage) {
      const float* first = subspace.entry(static_cast<int>(stage), 0);
      tables.emplace_back(first, first + size);
    }
    for (std::size_t begin = 0; begin < width; begin += kUnitDims, ++unit)
      add(code, stages, column + begin,
          round_entries({tables, width, begin, std::min(begin + kUnitDims, width)}, unit, units, bytes));
    column += width, code += stages;
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
  if (2 * rope.frequencies().size() != static_cast<std::size_t>(keys.dim())) return 0;
  std::size_t most = 0;
  for (const auto& subspace : folded_planes(keys)) most = std::max(most, units_of(2 * subspace.planes.size()) * kUnitDims);
  return most;
}

std::size_t num_units(const RotatedPqQuantizer& quantizer) {
  std::size_t units = 0;
  for (const auto& subspace : quantizer.subspaces()) units += units_of(static_cast<std::size_t>(subspace.dim()));
  return units;
}

KeyTables key_tables(const RotatedPqQuantizer& keys, const Rope& rope, std::size_t units, std::size_t rest_columns) {
  KeyTables made{
      std::vector<std::uint8_t>(kEntries * kStages * units * kUnitDims), {}, std::vector<float>(units * kUnitDims * rest_columns)};
  for (const auto& subspace : folded_planes(keys)) {
    const std::size_t width = 2 * subspace.planes.size();
    for (std::size_t begin = 0; begin < width; begin += kUnitDims) {
      const Columns columns{subspace.tables, width, begin, std::min(begin + kUnitDims, width)};
      const std::size_t at = made.units.size();
      KeyUnit unit = no_keys();
      const auto rounded = round_entries(columns, at, units, made.tables);
      set_codes(unit.codes, subspace.first_code, subspace.tables.size());
      unit.scale = rounded.scale;
      unit.rest_begin = static_cast<int>(subspace.column);
      unit.rest_count = static_cast<int>(width);
      for (std::size_t i = 0; i < columns.count(); ++i) {
        const std::size_t plane = subspace.planes[(begin + i) / 2], dim = static_cast<std::size_t>(keys.dim());
        unit.columns[i] = static_cast<int>(i % 2 == 0 ? plane : plane + dim / 2);
        unit.turns[i / 2] = turns_of(rope.frequencies()[plane]);
        unit.offsets[offset_place(i)] = half_bits_of(1024 + rounded.offsets[i]);
        for (std::size_t j = 0; j < width; ++j)
          made.rests[(at * kUnitDims + i) * rest_columns + j] = subspace.inverse[j * width + begin + i] / rounded.scale;
      }
      made.units.push_back(unit);
    }
  }
  made.units.resize(units, no_keys());
  return made;
}

KeyTables rotated_key_tables(const RotatedPqQuantizer& keys, std::size_t units) {
  KeyTables made{std::vector<std::uint8_t>(kEntries * kStages * units * kUnitDims), {}, {}};
  round_units(keys, units, made.tables, [&](std::size_t code, std::size_t stages, std::size_t column, const Rounded& rounded) {
    KeyUnit unit = no_keys();
    set_codes(unit.codes, code, stages);
    unit.scale = rounded.scale;
    unit.rest_begin = static_cast<int>(column);
    unit.rest_count = static_cast<int>(rounded.offsets.size());
    for (std::size_t i = 0; i < rounded.offsets.size(); ++i)
      unit.offsets[offset_place(i)] = half_bits_of(1024 + rounded.offsets[i]);
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
  round_units(values, units, made.tables, [&](std::size_t code, std::size_t stages, std::size_t column, const Rounded& rounded) {
    ValueUnit unit{};
    set_codes(unit.codes, code, stages);
    unit.scale = rounded.scale;
    unit.column = static_cast<int>(column);
    unit.width = static_cast<int>(rounded.offsets.size());
    for (std::size_t i = 0; i < rounded.offsets.size(); ++i) unit.low[i] = -rounded.offsets[i] * rounded.scale;
    made.units.push_back(unit);
  });
  made.units.resize(units, ValueUnit{});
  return made;
}

}  // namespace veloxquant
