// Attention of few queries over codes, without a row of keys or values in memory: look-ups of bytes straight into scores and sums.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "veloxquant/kernels/packed_lookup.h"

namespace veloxquant {

/// Columns that are looked up at once where attention reads codes: of a vector, the sum of one entry of each of `count` tables
/// [256, kEntryColumns] of bytes.  Sums of entries are at most 255.  No tables: zeros.
inline constexpr std::size_t kEntryColumns = 8, kMostEntries = 4;
struct EntryColumns {
  std::size_t count = 0;
  CodePlace codes[kMostEntries] = {};
  const std::uint8_t* tables[kMostEntries] = {};
};

/// Groups of columns are read four at a time, a row of kTurnColumns columns.  A group of keys has the first dimensions of four
/// planes, then the second ones.  A row of keys that are whole numbers has the first dimensions of all 16 planes, those of group g
/// from place kGroupPlaces[g] on, and then the second ones in the same order.
inline constexpr std::size_t kTurnGroups = 4, kTurnPlanes = 16, kTurnColumns = 2 * kTurnPlanes;
inline constexpr std::size_t kGroupPlaces[kTurnGroups] = {0, 8, 4, 12};

/// Tokens of a block: tile after tile.  At most kMostTokens.
struct BlockOfTiles {
  const std::uint8_t* bytes;
  std::size_t tile_bytes, tile_tokens, tokens;
};
inline constexpr std::size_t kMostTokens = 256;

/// Positions that turn by angles of their own; queries are turned back to the begin of each stretch of so many.
inline constexpr std::size_t kTurnedTokens = 16;

/// Keys as whole numbers: (sum of two bytes − offset) · 2^shift, which fits into 16 bits also when it is turned.
struct KeyGrid {
  const std::int16_t* offsets;  // [rows, kTurnColumns], times 2^shift
  int shift;
  const std::int16_t* angles;  // [rows, kTurnedTokens, 2, kTurnPlanes]: cosines, then sines; 2¹⁵ is 1
};

/// Queries as whole numbers: scores, which are sums of products of these with turned keys, fit into 32 bits.
struct TurnedQueries {
  const std::int16_t* q;  // [stretches, rows, num_queries, kTurnColumns]
  std::size_t num_queries;
  const float* factors;  // [num_queries]: what a score is times its whole number
};

/// to = x [rows, count, kTurnColumns] turned by angles [rows, 2, kTurnPlanes], as in KeyGrid but of floats.
void turn_rows(const float* x, std::size_t rows, std::size_t count, const float* angles, float* to);

/// to [count] = the nearest whole numbers to x [count], which are within ±32767; count is a multiple of kTurnColumns.
void round_rows(const float* x, std::size_t count, std::int16_t* to);

/// Sums of bytes [blocks, rows, kMostTokens, kTurnColumns] of a multiple of kTurnGroups groups, for whole tiles of at most
/// kLookUpBlocks blocks.  In memory of the thread, until it looks up others.
inline constexpr std::size_t kLookUpBlocks = 4;
const std::uint8_t* look_up_entries(std::span<const BlockOfTiles> blocks, std::span<const EntryColumns> groups);

/// scores[r · score_stride + t] = q[r]·k[t]: keys that were looked up, turned (to 15 bits, rounded), and the queries of their
/// stretch.  What lies behind the last token of its stretch is read, but not used.
void score_bytes(const std::uint8_t* bytes, std::size_t tokens, std::size_t rows, const KeyGrid& grid, const TurnedQueries& queries,
                 float* scores, std::size_t score_stride);

/// The same of keys that are whole numbers in memory, [tokens, rows, kTurnColumns]; of `grid` only the angles are read.
void score_wide(const std::int16_t* keys, std::size_t tokens, std::size_t rows, const KeyGrid& grid, const TurnedQueries& queries,
                float* scores, std::size_t score_stride);

/// scores[r · score_stride + tokens[i]] += factors[r] · q[r]·keys[i], in floats: keys [tokens.size(), rows, kTurnColumns] that are
/// turned by angles [kTurnedTokens, rows, 2, kTurnPlanes], and the queries of their stretch.
struct FloatQueries {
  const float* q;  // as TurnedQueries has them
  std::size_t num_queries;
  const float* factors;
};
void add_scores(const float* keys, std::span<const std::size_t> tokens, std::size_t rows, const float* angles,
                const FloatQueries& queries, float* scores, std::size_t score_stride);

/// keys [tokens, rows, kTurnColumns] = the sums of an entry of each code's table, of `tables` [rows, codes, 256, kTurnColumns],
/// which do not overflow.
void sum_wide_entries(const BlockOfTiles& block, std::span<const CodePlace> codes, const std::int16_t* tables, std::size_t rows,
                      std::int16_t* keys);

/// sums[r] += Σ_t weights[r · weight_stride + t] · v[t]: sums of bytes that were looked up, sums [num_queries, rows, kTurnColumns].
/// Weights count in steps of 2⁻¹⁵ of the largest of their query.
void add_bytes(const std::uint8_t* bytes, std::size_t tokens, std::size_t rows, const float* weights, std::size_t num_queries,
               std::size_t weight_stride, float* sums);

namespace reference {
void turn_rows(const float* x, std::size_t rows, std::size_t count, const float* angles, float* to);
void round_rows(const float* x, std::size_t count, std::int16_t* to);
/// Here into `bytes`, of the block's tokens alone.
void look_up_entries(const BlockOfTiles& block, std::span<const EntryColumns> groups, std::uint8_t* bytes);
void score_bytes(const std::uint8_t* bytes, std::size_t tokens, std::size_t rows, const KeyGrid& grid, const TurnedQueries& queries,
                 float* scores, std::size_t score_stride);
void score_wide(const std::int16_t* keys, std::size_t tokens, std::size_t rows, const KeyGrid& grid, const TurnedQueries& queries,
                float* scores, std::size_t score_stride);
void add_scores(const float* keys, std::span<const std::size_t> tokens, std::size_t rows, const float* angles,
                const FloatQueries& queries, float* scores, std::size_t score_stride);
void sum_wide_entries(const BlockOfTiles& block, std::span<const CodePlace> codes, const std::int16_t* tables, std::size_t rows,
                      std::int16_t* keys);
void add_bytes(const std::uint8_t* bytes, std::size_t tokens, std::size_t rows, const float* weights, std::size_t num_queries,
               std::size_t weight_stride, float* sums);
}  // namespace reference

}  // namespace veloxquant
