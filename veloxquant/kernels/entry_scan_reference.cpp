#include "veloxquant/kernels/entry_scan.h"

namespace veloxquant::reference {

void turn_rows(const float* rows, std::size_t groups, std::size_t num_rows, const float* angles, float* to) {
  for (std::size_t g = 0; g < groups; ++g, angles += 2 * kEntryColumns)
    for (std::size_t r = 0; r < num_rows; ++r, rows += kEntryColumns, to += kEntryColumns)
      for (std::size_t i = 0; i < kEntryColumns; ++i) to[i] = rows[i] * angles[i] + rows[i ^ 1] * angles[kEntryColumns + i];
}

namespace {

float entry(const BlockOfTiles& block, std::size_t t, const EntryColumns& columns, std::size_t i) {
  const std::uint8_t* tile = block.bytes + t / block.tile_tokens * block.tile_bytes;
  float sum = 0;
  for (std::size_t stage = 0; stage < 2; ++stage) {
    const auto [offset, stride] = columns.codes[stage];
    sum += columns.tables[stage][tile[offset + t % block.tile_tokens * stride] * kEntryColumns + i];
  }
  return sum;
}

}  // namespace

void score_entries(const BlockOfTiles& block, std::span<const EntryColumns> groups, const TurnedQueries& queries, float* scores,
                   std::size_t score_stride) {
  for (std::size_t r = 0; r < queries.num_queries; ++r)
    for (std::size_t t = 0; t < block.tokens; ++t) {
      double sum = 0;
      for (std::size_t g = 0; g < groups.size(); ++g) {
        const float* angles = queries.angles + (g * kTurnedTokens + t % kTurnedTokens) * 2 * kEntryColumns;
        const float* q = queries.q + ((t / kTurnedTokens * groups.size() + g) * queries.num_queries + r) * kEntryColumns;
        for (std::size_t i = 0; i < kEntryColumns; ++i)
          sum += q[i] * (entry(block, t, groups[g], i) * angles[i] + entry(block, t, groups[g], i ^ 1) * angles[kEntryColumns + i]);
      }
      scores[r * score_stride + t] = static_cast<float>(sum);
    }
}

void add_entries(const BlockOfTiles& block, std::span<const EntryColumns> groups, const float* weights, std::size_t num_queries,
                 std::size_t weight_stride, float* sums) {
  for (std::size_t r = 0; r < num_queries; ++r)
    for (std::size_t g = 0; g < groups.size(); ++g)
      for (std::size_t i = 0; i < kEntryColumns; ++i, ++sums)
        for (std::size_t t = 0; t < block.tokens; ++t) *sums += weights[r * weight_stride + t] * entry(block, t, groups[g], i);
}

}  // namespace veloxquant::reference
