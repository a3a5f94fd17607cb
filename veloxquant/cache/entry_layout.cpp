#include "veloxquant/cache/entry_layout.h"

#include <algorithm>
#include <numeric>

#include "veloxquant/core/fetch.h"

namespace veloxquant {

EntryLayout::EntryLayout(std::span<const BytePiece> pieces, EntryOrder order) : order_(order) {
  struct Rest {
    const BytePiece* piece;
    std::size_t column, from;

    std::size_t width() const { return piece->tables->width - from; }
  };
  std::vector<Rest> rests;
  std::size_t columns = 0;
  for (const auto& piece : pieces) columns += piece.tables->width;
  places_.resize(columns);
  columns = 0;
  for (const auto& piece : pieces) {
    Rest rest{&piece, columns, 0};
    for (; rest.width() >= kEntryColumns; rest.from += kEntryColumns)
      add_columns(piece, columns, rest.from, kEntryColumns, add_group());
    if (rest.width() > 0) rests.push_back(rest);
    columns += piece.tables->width;
  }
  // The widest first: into a group that has room for it, a new one as long as so many are needed anyway, or cut into what room
  // there is.
  std::stable_sort(rests.begin(), rests.end(), [](const Rest& a, const Rest& b) { return a.width() > b.width(); });
  const std::size_t needed = (columns + kEntryColumns - 1) / kEntryColumns;
  for (auto& rest : rests) {
    const std::size_t stages = rest.piece->tables->entries.size();
    const auto room = [&](std::size_t group) { return has_room(group, stages) ? kEntryColumns - used_[group] : 0; };
    const auto place = [&](std::size_t group, std::size_t count) {
      add_columns(*rest.piece, rest.column, rest.from, count, group);
      rest.from += count;
    };
    for (std::size_t group = 0; group < groups_.size() && rest.width() > 0; ++group)
      if (room(group) >= rest.width()) place(group, rest.width());
    if (rest.width() > 0 && groups_.size() < needed) place(add_group(), rest.width());
    for (std::size_t group = 0; group < groups_.size() && rest.width() > 0; ++group)
      if (room(group) > 0) place(group, std::min(room(group), rest.width()));
    if (rest.width() > 0) place(add_group(), rest.width());
  }
  while (groups_.size() % kTurnGroups != 0) add_group();
}

std::size_t EntryLayout::add_group() {
  groups_.emplace_back();
  used_.push_back(0);
  // Columns of a group may stand among those of the groups that follow.
  const std::size_t columns = (groups_.size() + kTurnGroups - 1) / kTurnGroups * kTurnColumns;
  scales_.resize(columns), offsets_.resize(columns), largest_.resize(columns);
  return groups_.size() - 1;
}

bool EntryLayout::has_room(std::size_t group, std::size_t stages) const {
  return used_[group] < kEntryColumns && groups_[group].count + stages <= kMostEntries;
}

void EntryLayout::fetch() const {
  for (const auto& table : tables_) veloxquant::fetch(table);
}

// Columns from … from + count − 1 of a piece, whose first is the vector's `column`, behind those that a group has.
void EntryLayout::add_columns(const BytePiece& piece, std::size_t column, std::size_t from, std::size_t count, std::size_t group) {
  constexpr std::size_t kHalf = kEntryColumns / 2;
  const ByteTables& tables = *piece.tables;
  EntryColumns& entries = groups_[group];
  const std::size_t first_table = tables_.size();
  for (std::size_t stage = 0; stage < tables.entries.size(); ++stage) {
    auto& table = tables_.emplace_back(kTableEntries * kEntryColumns);
    entries.codes[entries.count] = piece.codes[stage];
    entries.tables[entries.count++] = table.data();
  }
  for (std::size_t i = from; i < from + count; ++i) {
    const std::size_t in_group = used_[group]++, row = group / kTurnGroups * kTurnColumns, in_row = group % kTurnGroups;
    std::size_t byte_place = in_group, place = row + in_row * kEntryColumns + in_group;
    if (order_ == EntryOrder::kTurned) {
      byte_place = in_group % 2 * kHalf + in_group / 2;
      place = row + in_group % 2 * kTurnPlanes + kGroupPlaces[in_row] + in_group / 2;
    }
    places_[column + i] = place;
    scales_[place] = tables.scale(i);
    offsets_[place] = tables.offset(i);
    for (std::size_t stage = 0; stage < tables.entries.size(); ++stage) {
      int largest = 0;
      for (std::size_t entry = 0; entry * tables.width < tables.entries[stage].size(); ++entry) {
        const std::uint8_t byte = tables.entries[stage][entry * tables.width + i];
        tables_[first_table + stage][entry * kEntryColumns + byte_place] = byte;
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

void EntryLayout::add(const std::uint8_t* bytes, std::size_t tokens, const float* weights, std::size_t num_queries,
                      std::size_t weight_stride, float* sums) const {
  thread_local std::vector<float> grouped;
  grouped.assign(num_queries * columns(), 0.0f);
  add_bytes(bytes, tokens, columns() / kTurnColumns, weights, num_queries, weight_stride, grouped.data());
  for (std::size_t r = 0; r < num_queries; ++r) {
    const float *of_row = grouped.data() + r * columns(), *first = weights + r * weight_stride;
    const float total = sum_of(first, tokens);
    for (const std::size_t place : places_) *sums++ += scales_[place] * (of_row[place] - offsets_[place] * total);
  }
}

}  // namespace veloxquant
