// Attention of few queries over codes, without a row of keys or values in memory: look-ups straight into scores and sums.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "veloxquant/kernels/packed_lookup.h"

namespace veloxquant {

/// Columns that are looked up at once where attention reads codes: of a vector, the sum of one entry of each of two tables
/// [256, kEntryColumns].
inline constexpr std::size_t kEntryColumns = 8;
struct EntryColumns {
  CodePlace codes[2];
  const float* tables[2];
};

/// Tokens of a block: tile after tile.
struct BlockOfTiles {
  const std::uint8_t* bytes;
  std::size_t tile_bytes, tile_tokens, tokens;
};

/// Positions that turn by angles of their own; queries are turned back to the begin of each stretch of so many.
inline constexpr std::size_t kTurnedTokens = 8;

/// Columns [groups, kEntryColumns] of queries and angles, in pairs (2i, 2i + 1) that turn.
struct TurnedQueries {
  const float* q;  // [stretches, groups, num_queries, kEntryColumns]
  std::size_t num_queries;
  const float* angles;  // [groups, kTurnedTokens, 2, kEntryColumns]: cosines, each twice, then (−sin, sin)
};

/// to = rows [groups, num_rows, kEntryColumns] turned by angles [groups, 2, kEntryColumns] as in TurnedQueries.
void turn_rows(const float* rows, std::size_t groups, std::size_t num_rows, const float* angles, float* to);

/// scores[r · score_stride + t] = q[r]·k[t]: keys, each group of columns looked up and turned, and the queries of their stretch.
/// Tiles are whole stretches; what lies behind the last token of its stretch is read, but not used.
void score_entries(const BlockOfTiles& block, std::span<const EntryColumns> groups, const TurnedQueries& queries, float* scores,
                   std::size_t score_stride);

/// sums[r, g] += Σ_t weights[r · weight_stride + t] · v[t, g]; sums [num_queries, groups, kEntryColumns].
void add_entries(const BlockOfTiles& block, std::span<const EntryColumns> groups, const float* weights, std::size_t num_queries,
                 std::size_t weight_stride, float* sums);

namespace reference {
void turn_rows(const float* rows, std::size_t groups, std::size_t num_rows, const float* angles, float* to);
void score_entries(const BlockOfTiles& block, std::span<const EntryColumns> groups, const TurnedQueries& queries, float* scores,
                   std::size_t score_stride);
void add_entries(const BlockOfTiles& block, std::span<const EntryColumns> groups, const float* weights, std::size_t num_queries,
                 std::size_t weight_stride, float* sums);
}  // namespace reference

}  // namespace veloxquant
