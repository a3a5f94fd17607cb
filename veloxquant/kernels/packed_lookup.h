// The inner loops of attention over codes: codes to vectors, vectors to scores, weights to sums.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace veloxquant {

/// Tables may be read, and rows written, so many floats beyond their end.
inline constexpr std::size_t kLookupPadding = 16;

/// Where a code of the tokens of a tile stands: that of token t at byte offset + t · stride.
struct CodePlace {
  std::size_t offset, stride;
};

/// Columns [column, column + width) of a vector are the sum of one entry of each of one or two tables [num_centroids, width].
struct LookupPiece {
  std::size_t column, width;
  CodePlace codes[2];
  const float* tables[2];  // the second null: one table
};

/// rows[t] = the entries of token t's codes, for tokens of one tile.  Pieces ascend in
/// column without gaps.  Rows are `stride` floats apart, at least the columns and kLookupPadding.
void sum_entries(const std::uint8_t* tile, std::size_t tokens, std::span<const LookupPiece> pieces, float* rows,
                 std::size_t stride);

/// scores[r · score_stride + t] = scale · q[r]·k[t]; q [num_queries, dim], k `k_stride` apart.  For few queries: k comes from
/// memory once.
void score_rows(const float* q, std::size_t num_queries, const float* k, std::size_t tokens, std::size_t k_stride, std::size_t dim,
                float scale, float* scores, std::size_t score_stride);

/// sums[r] += Σ_t weights[r · weight_stride + t] · v[t]; sums [num_queries, dim], v `v_stride` apart.
void add_rows(const float* weights, std::size_t num_queries, std::size_t weight_stride, const float* v, std::size_t tokens,
              std::size_t v_stride, std::size_t dim, float* sums);

namespace reference {
void sum_entries(const std::uint8_t* tile, std::size_t tokens, std::span<const LookupPiece> pieces, float* rows,
                 std::size_t stride);
void score_rows(const float* q, std::size_t num_queries, const float* k, std::size_t tokens, std::size_t k_stride, std::size_t dim,
                float scale, float* scores, std::size_t score_stride);
void add_rows(const float* weights, std::size_t num_queries, std::size_t weight_stride, const float* v, std::size_t tokens,
              std::size_t v_stride, std::size_t dim, float* sums);
}  // namespace reference

}  // namespace veloxquant
