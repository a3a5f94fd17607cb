#include "veloxquant/quantize/byte_tables.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace veloxquant {
namespace {

// A sum of two entries loses up to two steps to low ends that are whole, and gains one by rounding.
constexpr double kSteps = kMostByteSum - 3;
constexpr double kOffsets = kMostByteOffset - 2;

struct Bounds {
  double low, range;
};

Bounds bounds_of(std::span<const float> table, std::size_t width, std::size_t column) {
  float low = table[column], high = low;
  for (std::size_t at = column; at < table.size(); at += width) low = std::min(low, table[at]), high = std::max(high, table[at]);
  return {low, static_cast<double>(high) - low};
}

// Columns begin … end − 1.
void round_unit(std::span<const std::vector<float>> tables, std::size_t begin, std::size_t end, ByteTables& made) {
  double least = std::numeric_limits<float>::min();
  for (std::size_t column = begin; column < end; ++column) {
    Bounds sum{0, 0};
    for (const auto& table : tables) {
      const auto bounds = bounds_of(table, made.width, column);
      sum.low += bounds.low, sum.range += bounds.range;
      least = std::max(least, std::abs(bounds.low) / kOffsets);
    }
    least = std::max({least, sum.range / kSteps, std::abs(sum.low) / kOffsets});
  }
  const auto scale = static_cast<float>(least);
  made.scales.push_back(scale);
  for (std::size_t stage = 0; stage < tables.size(); ++stage)
    for (std::size_t column = begin; column < end; ++column) {
      const auto& table = tables[stage];
      const double offset = std::ceil(-bounds_of(table, made.width, column).low / scale);
      made.offsets[stage].push_back(static_cast<float>(offset));
      for (std::size_t at = column; at < table.size(); at += made.width)
        made.entries[stage][at] = static_cast<std::uint8_t>(std::lround(table[at] / scale + offset));
    }
}

}  // namespace

ByteTables round_to_bytes(std::span<const std::vector<float>> tables, std::size_t width) {
  ByteTables made{width, {}, std::vector<std::vector<float>>(tables.size()), {}};
  for (const auto& table : tables) made.entries.emplace_back(table.size());
  for (std::size_t begin = 0; begin < width; begin += kByteColumns)
    round_unit(tables, begin, std::min(begin + kByteColumns, width), made);
  return made;
}

}  // namespace veloxquant
