#include "veloxquant/cache/entry_layout.h"

#include <algorithm>

namespace veloxquant {

EntryLayout::EntryLayout(std::span<const LookupPiece> pieces) {
  for (std::size_t p = 0; p < pieces.size(); ++p) {
    const auto& piece = pieces[p];
    const auto narrow = [&](std::size_t i) {
      return i < pieces.size() && !pieces[i].tables[1] && 2 * pieces[i].width <= kEntryColumns;
    };
    if (narrow(p) && narrow(p + 1)) {
      add_pair(piece, pieces[++p]);
    } else {
      for (std::size_t from = 0; from < piece.width; from += kEntryColumns) add_group(piece, from);
    }
  }
}

void EntryLayout::add(const BlockOfTiles& block, const float* weights, std::size_t num_queries, std::size_t weight_stride,
                      float* sums) const {
  thread_local std::vector<float> grouped;
  grouped.assign(num_queries * columns(), 0.0f);
  add_entries(block, groups_, weights, num_queries, weight_stride, grouped.data());
  for (std::size_t r = 0; r < num_queries; ++r)
    for (const std::size_t place : places_) *sums++ += grouped[r * columns() + place];
}

// Columns `from` … of a piece.
void EntryLayout::add_group(const LookupPiece& piece, std::size_t from) {
  const std::size_t count = std::min(kEntryColumns, piece.width - from);
  for (std::size_t i = 0; i < count; ++i) places_.push_back(columns() + i);
  const bool pair = piece.tables[1] != nullptr;
  groups_.push_back({{piece.codes[0], piece.codes[pair ? 1 : 0]},
                     {table(piece.tables[0], piece.width, from, count, 0), table(piece.tables[1], piece.width, from, count, 0)}});
}

// Two pieces whose entries stand beside each other.
void EntryLayout::add_pair(const LookupPiece& first, const LookupPiece& second) {
  for (std::size_t i = 0; i < first.width + second.width; ++i) places_.push_back(columns() + i);
  groups_.push_back({{first.codes[0], second.codes[0]},
                     {table(first.tables[0], first.width, 0, first.width, 0),
                      table(second.tables[0], second.width, 0, second.width, first.width)}});
}

// A table with columns from … from + count − 1 of entries [256, width] at columns `to` on; of zeros for no entries.
const float* EntryLayout::table(const float* entries, std::size_t width, std::size_t from, std::size_t count, std::size_t to) {
  auto& table = tables_.emplace_back(256 * kEntryColumns);
  for (std::size_t code = 0; code < 256 && entries; ++code)
    std::copy_n(entries + code * width + from, count, table.data() + code * kEntryColumns + to);
  return table.data();
}

}  // namespace veloxquant
