#include "veloxquant/kernels/packed_lookup.h"

#include <gtest/gtest.h>

#include <array>

#include "tests/kernels/every_target.h"
#include "veloxquant/quantize/packed_layout.h"

namespace veloxquant {
namespace {

using testing::expect_near;
using testing::for_each_target;
using testing::normal_values;

// Widths and numbers of codes of all kinds, one and two tables.
TEST(PackedLookup, SumsEntriesAsTheReferenceDoes) {
  for (const std::size_t width : {1, 3, 4, 8, 9, 16, 21}) {
    for (const std::size_t codes : {1, 2, 5, 8, 11}) {
      const PackedCodes layout{codes};
      std::vector<std::vector<float>> tables;
      std::vector<LookupPiece> pieces;
      std::size_t column = 0;
      for (std::size_t code = 0; code < codes; ++code) tables.push_back(normal_values(256 * width + kLookupPadding, code));
      for (std::size_t code = 0; code < codes; code += 2) {
        const bool pair = code + 1 < codes;
        pieces.push_back({column,
                          width,
                          {layout.place(code), pair ? layout.place(code + 1) : CodePlace{}},
                          {tables[code].data(), pair ? tables[code + 1].data() : nullptr}});
        column += width;
      }
      std::vector<std::uint8_t> tile(layout.tile_bytes());
      Random random(7);
      for (auto& byte : tile) byte = static_cast<std::uint8_t>(random.below(256));
      for (const std::size_t tokens : {std::size_t{1}, std::size_t{7}, kPackedTileTokens}) {
        SCOPED_TRACE(::testing::Message() << "width " << width << " codes " << codes << " tokens " << tokens);
        const std::size_t stride = column + kLookupPadding;
        const auto columns = [&](const std::vector<float>& rows) {
          std::vector<float> result;
          for (std::size_t t = 0; t < tokens; ++t)
            for (std::size_t i = 0; i < column; ++i) result.push_back(rows[t * stride + i]);
          return result;
        };
        std::vector<float> expected(tokens * stride + kLookupPadding);
        reference::sum_entries(tile.data(), tokens, pieces, expected.data(), stride);
        for_each_target([&] {
          std::vector<float> rows(expected.size(), -1.0f);
          sum_entries(tile.data(), tokens, pieces, rows.data(), stride);
          EXPECT_EQ(columns(rows), columns(expected));
        });
      }
    }
  }
}

TEST(PackedLookup, EveryCodeOfABlockHasAPlaceOfItsOwn) {
  for (const std::size_t codes : {1, 3, 4, 6, 16, 19}) {
    const PackedCodes layout{codes};
    std::vector<int> seen(layout.tile_bytes());
    for (std::size_t code = 0; code < codes; ++code)
      for (std::size_t t = 0; t < kPackedTileTokens; ++t) ++seen.at(layout.place(code).offset + t * layout.place(code).stride);
    for (const int count : seen) EXPECT_EQ(count, 1);
  }
}

TEST(PackedLookup, ScoresAndSumsAsTheReferenceDoes) {
  for (const std::size_t dim : {1, 8, 31, 64, 100, 128}) {
    for (const std::size_t queries : {1, 2, 3, 4, 7, 11}) {
      const std::size_t tokens = 9, stride = dim + kLookupPadding, row = tokens + 4;
      SCOPED_TRACE(::testing::Message() << "dim " << dim << " queries " << queries);
      const auto q = normal_values(queries * dim, 1), vectors = normal_values(tokens * stride, 2),
                 weights = normal_values(queries * row, 3), sums = normal_values(queries * dim, 4);
      std::vector<float> scores(queries * row);
      reference::score_rows(q.data(), queries, vectors.data(), tokens, stride, dim, 0.3f, scores.data(), row);
      auto added = sums;
      reference::add_rows(weights.data(), queries, row, vectors.data(), tokens, stride, dim, added.data());
      for_each_target([&] {
        std::vector<float> some(scores.size());
        score_rows(q.data(), queries, vectors.data(), tokens, stride, dim, 0.3f, some.data(), row);
        expect_near(some, scores, 1e-5, 1e-5);
        auto other = sums;
        add_rows(weights.data(), queries, row, vectors.data(), tokens, stride, dim, other.data());
        expect_near(other, added, 1e-5, 1e-5);
      });
    }
  }
}

}  // namespace
}  // namespace veloxquant
