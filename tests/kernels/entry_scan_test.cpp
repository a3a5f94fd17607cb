#include "veloxquant/kernels/entry_scan.h"

#include <gtest/gtest.h>

#include "tests/kernels/every_target.h"
#include "veloxquant/quantize/packed_layout.h"

namespace veloxquant {
namespace {

using testing::expect_near;
using testing::for_each_target;
using testing::normal_values;

// A block of random codes, two a group and those of the last word closer together.
struct Codes {
  PackedCodes layout;
  std::vector<std::uint8_t> bytes;
  std::vector<std::vector<float>> tables;
  std::vector<EntryColumns> groups;

  explicit Codes(std::size_t num_groups) : layout{2 * num_groups}, bytes(layout.block_bytes()) {
    Random random(num_groups);
    for (auto& byte : bytes) byte = static_cast<std::uint8_t>(random.below(256));
    for (std::size_t code = 0; code < 2 * num_groups; ++code) tables.push_back(normal_values(256 * kEntryColumns, code));
    for (std::size_t code = 0; code < 2 * num_groups; code += 2)
      groups.push_back({{layout.place(code), layout.place(code + 1)}, {tables[code].data(), tables[code + 1].data()}});
  }

  BlockOfTiles block(std::size_t tokens) const { return {bytes.data(), layout.tile_bytes(), kPackedTileTokens, tokens}; }
};

constexpr std::size_t kTokens[] = {1, 7, 8, 9, 31, 32, 33, 100, 256};

TEST(EntryScan, TurnsRowsAsTheReferenceDoes) {
  for (const std::size_t groups : {1, 3}) {
    for (const std::size_t rows : {1, 5}) {
      const auto from = normal_values(groups * rows * kEntryColumns, 1), angles = normal_values(groups * 2 * kEntryColumns, 2);
      std::vector<float> expected(from.size());
      reference::turn_rows(from.data(), groups, rows, angles.data(), expected.data());
      for_each_target([&] {
        std::vector<float> to(from.size());
        turn_rows(from.data(), groups, rows, angles.data(), to.data());
        expect_near(to, expected, 1e-6, 1e-6);
      });
    }
  }
}

TEST(EntryScan, ScoresAsTheReferenceDoes) {
  for (const std::size_t groups : {1, 3, 4, 8}) {
    const Codes codes(groups);
    const auto angles = normal_values(groups * kTurnedTokens * 2 * kEntryColumns, 1);
    for (const std::size_t queries : {1, 2, 3, 4, 7}) {
      const auto q = normal_values(kPackedBlockTokens / kTurnedTokens * groups * queries * kEntryColumns, 2);
      for (const std::size_t tokens : kTokens) {
        SCOPED_TRACE(::testing::Message() << groups << " groups, " << queries << " queries, " << tokens << " tokens");
        const std::size_t stride = tokens + 3;
        const TurnedQueries turned{q.data(), queries, angles.data()};
        std::vector<float> expected(queries * stride, 7.0f);
        reference::score_entries(codes.block(tokens), codes.groups, turned, expected.data(), stride);
        for_each_target([&] {
          std::vector<float> scores(expected.size(), 7.0f);
          score_entries(codes.block(tokens), codes.groups, turned, scores.data(), stride);
          expect_near(scores, expected, 3e-5, 1e-5);
        });
      }
    }
  }
}

TEST(EntryScan, AddsAsTheReferenceDoes) {
  for (const std::size_t groups : {1, 3, 4, 8}) {
    const Codes codes(groups);
    for (const std::size_t queries : {1, 2, 3, 4, 7}) {
      for (const std::size_t tokens : kTokens) {
        SCOPED_TRACE(::testing::Message() << groups << " groups, " << queries << " queries, " << tokens << " tokens");
        const std::size_t stride = tokens + 3;
        const auto weights = normal_values(queries * stride, 1), before = normal_values(queries * groups * kEntryColumns, 2);
        auto expected = before;
        reference::add_entries(codes.block(tokens), codes.groups, weights.data(), queries, stride, expected.data());
        for_each_target([&] {
          auto sums = before;
          add_entries(codes.block(tokens), codes.groups, weights.data(), queries, stride, sums.data());
          expect_near(sums, expected, 1e-4, 1e-5);
        });
      }
    }
  }
}

}  // namespace
}  // namespace veloxquant
