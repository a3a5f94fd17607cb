#include <algorithm>
#include <cmath>
#include <vector>

#include "veloxquant/kernels/entry_scan.h"

namespace veloxquant::reference {

void turn_rows(const float* x, std::size_t rows, std::size_t count, const float* angles, float* to) {
  for (std::size_t row = 0; row < rows; ++row, angles += kTurnColumns)
    for (std::size_t r = 0; r < count; ++r, x += kTurnColumns, to += kTurnColumns)
      for (std::size_t i = 0; i < kTurnPlanes; ++i) {
        const float a = x[i], b = x[i + kTurnPlanes], c = angles[i], s = angles[i + kTurnPlanes];
        to[i] = a * c - b * s;
        to[i + kTurnPlanes] = b * c + a * s;
      }
}

void round_rows(const float* x, std::size_t count, std::int16_t* to) {
  for (std::size_t i = 0; i < count; ++i) to[i] = static_cast<std::int16_t>(std::nearbyint(x[i]));
}

namespace {

// A product of two numbers of which 2¹⁵ is 1, rounded.
int product(int a, int b) {
  return (a * b + (1 << 14)) >> 15;
}

// key(t, column): whole numbers that are not turned.
template <class Key>
void score(std::size_t tokens, std::size_t rows, const KeyGrid& grid, const TurnedQueries& queries, float* scores,
           std::size_t score_stride, Key key) {
  for (std::size_t r = 0; r < queries.num_queries; ++r)
    for (std::size_t t = 0; t < tokens; ++t) {
      std::int64_t sum = 0;
      for (std::size_t row = 0; row < rows; ++row) {
        const std::int16_t* angles = grid.angles + (row * kTurnedTokens + t % kTurnedTokens) * kTurnColumns;
        const std::int16_t* q = queries.q + ((t / kTurnedTokens * rows + row) * queries.num_queries + r) * kTurnColumns;
        for (std::size_t i = 0; i < kTurnPlanes; ++i) {
          const int a = key(t, row * kTurnColumns + i), b = key(t, row * kTurnColumns + kTurnPlanes + i), c = angles[i],
                    s = angles[kTurnPlanes + i];
          sum += q[i] * (product(a, c) - product(b, s)) + q[kTurnPlanes + i] * (product(b, c) + product(a, s));
        }
      }
      scores[r * score_stride + t] = queries.factors[r] * static_cast<float>(sum);
    }
}

}  // namespace

void look_up_entries(const BlockOfTiles& block, std::span<const EntryColumns> groups, std::uint8_t* bytes) {
  for (std::size_t g = 0; g < groups.size(); ++g)
    for (std::size_t t = 0; t < block.tokens; ++t) {
      const std::uint8_t* tile = block.bytes + t / block.tile_tokens * block.tile_bytes;
      for (std::size_t i = 0; i < kEntryColumns; ++i) {
        int sum = 0;
        for (std::size_t of = 0; of < groups[g].count; ++of) {
          const auto [offset, stride] = groups[g].codes[of];
          sum += groups[g].tables[of][tile[offset + t % block.tile_tokens * stride] * kEntryColumns + i];
        }
        bytes[(g / kTurnGroups * kMostTokens + t) * kTurnColumns + g % kTurnGroups * kEntryColumns + i] =
            static_cast<std::uint8_t>(sum);
      }
    }
}

void score_bytes(const std::uint8_t* bytes, std::size_t tokens, std::size_t rows, const KeyGrid& grid, const TurnedQueries& queries,
                 float* scores, std::size_t score_stride) {
  // Where a column of whole numbers stands among those of bytes.
  std::size_t places[kTurnColumns];
  constexpr std::size_t kHalf = kEntryColumns / 2;
  for (std::size_t g = 0; g < kTurnGroups; ++g)
    for (std::size_t i = 0; i < kHalf; ++i) {
      places[kGroupPlaces[g] + i] = g * kEntryColumns + i;
      places[kTurnPlanes + kGroupPlaces[g] + i] = g * kEntryColumns + kHalf + i;
    }
  score(tokens, rows, grid, queries, scores, score_stride, [&](std::size_t t, std::size_t column) {
    const std::size_t row = column / kTurnColumns;
    return (bytes[(row * kMostTokens + t) * kTurnColumns + places[column % kTurnColumns]] << grid.shift) - grid.offsets[column];
  });
}

void score_wide(const std::int16_t* keys, std::size_t tokens, std::size_t rows, const KeyGrid& grid, const TurnedQueries& queries,
                float* scores, std::size_t score_stride) {
  score(tokens, rows, grid, queries, scores, score_stride,
        [&](std::size_t t, std::size_t column) { return keys[t * rows * kTurnColumns + column]; });
}

void add_scores(const float* keys, std::span<const std::size_t> tokens, std::size_t rows, const float* angles,
                const FloatQueries& queries, float* scores, std::size_t score_stride) {
  std::vector<float> turned(rows * kTurnColumns);
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    const std::size_t t = tokens[i];
    turn_rows(keys + i * turned.size(), rows, 1, angles + t % kTurnedTokens * turned.size(), turned.data());
    for (std::size_t r = 0; r < queries.num_queries; ++r) {
      double sum = 0;
      for (std::size_t j = 0; j < turned.size(); ++j) {
        const std::size_t row = t / kTurnedTokens * rows + j / kTurnColumns;
        sum += static_cast<double>(turned[j]) * queries.q[(row * queries.num_queries + r) * kTurnColumns + j % kTurnColumns];
      }
      scores[r * score_stride + t] += queries.factors[r] * static_cast<float>(sum);
    }
  }
}

void sum_wide_entries(const BlockOfTiles& block, std::span<const CodePlace> codes, const std::int16_t* tables, std::size_t rows,
                      std::int16_t* keys) {
  for (std::size_t t = 0; t < block.tokens; ++t) {
    const std::uint8_t* tile = block.bytes + t / block.tile_tokens * block.tile_bytes;
    for (std::size_t row = 0; row < rows; ++row)
      for (std::size_t i = 0; i < kTurnColumns; ++i) {
        int sum = 0;
        for (std::size_t c = 0; c < codes.size(); ++c) {
          const std::size_t entry = tile[codes[c].offset + t % block.tile_tokens * codes[c].stride];
          sum += tables[((row * codes.size() + c) * 256 + entry) * kTurnColumns + i];
        }
        *keys++ = static_cast<std::int16_t>(sum);
      }
  }
}

void add_bytes(const std::uint8_t* bytes, std::size_t tokens, std::size_t rows, const float* weights, std::size_t num_queries,
               std::size_t weight_stride, float* sums) {
  for (std::size_t r = 0; r < num_queries; ++r)
    for (std::size_t row = 0; row < rows; ++row)
      for (std::size_t i = 0; i < kTurnColumns; ++i, ++sums) {
        double sum = 0;
        for (std::size_t t = 0; t < tokens; ++t)
          sum += static_cast<double>(weights[r * weight_stride + t]) * bytes[(row * kMostTokens + t) * kTurnColumns + i];
        *sums += static_cast<float>(sum);
      }
}

}  // namespace veloxquant::reference
