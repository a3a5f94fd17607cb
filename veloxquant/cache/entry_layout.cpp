#include "veloxquant/cache/entry_layout.h"

#include <algorithm>
#include <numeric>

namespace veloxquant {

EntryLayout::EntryLayout(std::span<const BytePiece> pieces, EntryOrder order) : order_(order) {
  for (std::size_t p = 0; p < pieces.size(); ++p) {
    const auto& piece = pieces[p];
    const auto narrow = [&](std::size_t i) {
      return i < pieces.size() && pieces[i].tables->entries.size() == 1 && 2 * pieces[i].tables->width <= kEntryColumns;
    };
    const std::size_t width = piece.tables->width;
    if (narrow(p) && narrow(p + 1)) {
      const auto& next = pieces[++p];
      add_group(piece.codes[0], next.codes[0]);
      add_columns(piece, 0, width, 0);
      add_columns(next, 0, next.tables->width, width);
      continue;
    }
    for (std::size_t from = 0; from < width; from += kEntryColumns) {
      add_group(piece.codes[0], piece.codes[piece.tables->entries.size() - 1]);
      add_columns(piece, from, std::min(kEntryColumns, width - from), 0);
    }
  }
  while (groups_.size() % (order == EntryOrder::kPlain ? 2 : kTurnGroups) != 0)
    add_group(groups_.back().codes[0], groups_.back().codes[1]);
  tables_.resize(tables_.size() + kEntryPadding);
  for (std::size_t g = 0; g < groups_.size(); ++g)
    for (std::size_t stage = 0; stage < 2; ++stage) groups_[g].tables[stage] = table(g, stage);
}

void EntryLayout::add_group(const CodePlace& first, const CodePlace& second) {
  groups_.push_back({{first, second}, {nullptr, nullptr}});
  tables_.resize(tables_.size() + 2 * kTableEntries * kEntryColumns);
  // Columns of a group may stand among those of the groups that follow.
  const std::size_t columns = (groups_.size() + kTurnGroups - 1) / kTurnGroups * kTurnColumns;
  scales_.resize(columns), offsets_.resize(columns), largest_.resize(columns);
}

// Columns from … from + count − 1 of a piece, in the last group from column `to` on.  A piece behind another, of one table as it
// is, has the second table.
void EntryLayout::add_columns(const BytePiece& piece, std::size_t from, std::size_t count, std::size_t to) {
  const ByteTables& tables = *piece.tables;
  const std::size_t group = groups_.size() - 1;
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t column = from + i, in_group = to + i, half = kEntryColumns / 2;
    std::size_t byte_place = in_group, place = group * kEntryColumns + in_group;
    if (order_ == EntryOrder::kTurned) {
      byte_place = in_group % 2 * half + in_group / 2;
      place = group / kTurnGroups * kTurnColumns + in_group % 2 * kTurnPlanes + group % kTurnGroups * half + in_group / 2;
    }
    places_.push_back(place);
    scales_[place] = tables.scale(column);
    offsets_[place] = tables.offset(column);
    for (std::size_t stage = 0; stage < tables.entries.size(); ++stage) {
      int largest = 0;
      for (std::size_t entry = 0; entry * tables.width < tables.entries[stage].size(); ++entry) {
        const std::uint8_t byte = tables.entries[stage][entry * tables.width + column];
        table(group, to > 0 ? 1 : stage)[entry * kEntryColumns + byte_place] = byte;
        largest = std::max<int>(largest, byte);
      }
      largest_[place] += largest;
    }
  }
}

namespace {

// In so many sums that additions need not wait for each other.
float sum_of(const float* x, std::size_t count) {
  constexpr std::size_t kSums = 16;
  float sums[kSums] = {};
  std::size_t i = 0;
  for (; i + kSums <= count; i += kSums)
    for (std::size_t j = 0; j < kSums; ++j) sums[j] += x[i + j];
  for (; i < count; ++i) sums[i % kSums] += x[i];
  return std::accumulate(sums, sums + kSums, 0.0f);
}

}  // namespace

void EntryLayout::add(const BlockOfTiles& block, const float* weights, std::size_t num_queries, std::size_t weight_stride,
                      float* sums) const {
  thread_local std::vector<float> grouped;
  grouped.assign(num_queries * columns(), 0.0f);
  add_entries(block, groups_, weights, num_queries, weight_stride, grouped.data());
  for (std::size_t r = 0; r < num_queries; ++r) {
    const float *of_row = grouped.data() + r * columns(), *first = weights + r * weight_stride;
    const float total = sum_of(first, block.tokens);
    for (const std::size_t place : places_) *sums++ += scales_[place] * (of_row[place] - offsets_[place] * total);
  }
}

}  // namespace veloxquant
