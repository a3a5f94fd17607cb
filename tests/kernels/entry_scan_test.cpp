#include "veloxquant/kernels/entry_scan.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/kernels/every_target.h"
#include "veloxquant/quantize/packed_layout.h"

namespace veloxquant {
namespace {

using testing::expect_near;
using testing::for_each_target;
using testing::normal_values;

std::vector<std::int16_t> whole_numbers(std::size_t count, int most, std::uint64_t seed) {
  Random random(seed);
  std::vector<std::int16_t> values(count);
  for (auto& value : values)
    value = static_cast<std::int16_t>(static_cast<int>(random.below(static_cast<std::uint64_t>(2 * most + 1))) - most);
  return values;
}

// A block of random codes, none to four a group; those of the last word stand closer together.
struct Codes {
  PackedCodes layout;
  std::vector<std::uint8_t> bytes;
  std::vector<std::vector<std::uint8_t>> tables;
  std::vector<EntryColumns> groups;

  explicit Codes(std::size_t num_groups, std::size_t codes) : layout{codes}, bytes(layout.block_bytes()), groups(num_groups) {
    Random random(num_groups);
    for (auto& byte : bytes) byte = static_cast<std::uint8_t>(random.below(256));
    for (std::size_t g = 0; g < num_groups; ++g)
      for (auto& group = groups[g]; group.count < g % (kMostEntries + 1);) {
        auto& table = tables.emplace_back(256 * kEntryColumns);
        for (auto& byte : table) byte = static_cast<std::uint8_t>(random.below(256 / (g % (kMostEntries + 1))));
        group.codes[group.count] = layout.place(tables.size() % codes);
        group.tables[group.count++] = table.data();
      }
  }

  BlockOfTiles block(std::size_t tokens) const { return {bytes.data(), layout.tile_bytes(), kPackedTileTokens, tokens}; }
};

constexpr std::size_t kTokens[] = {1, 7, 8, 9, 31, 32, 33, 100, 256};
constexpr std::size_t kStretches = kPackedBlockTokens / kTurnedTokens;

TEST(EntryScan, TurnsAndRoundsRowsAsTheReferenceDoes) {
  for (const std::size_t rows : {1, 3})
    for (const std::size_t count : {1, 5}) {
      const auto from = normal_values(rows * count * kTurnColumns, 1, 9000), angles = normal_values(rows * kTurnColumns, 2);
      std::vector<float> expected(from.size());
      std::vector<std::int16_t> expected_whole(from.size());
      reference::turn_rows(from.data(), rows, count, angles.data(), expected.data());
      const auto few = normal_values(from.size(), 3, 6000);
      reference::round_rows(few.data(), few.size(), expected_whole.data());
      for_each_target([&] {
        std::vector<float> to(from.size());
        turn_rows(from.data(), rows, count, angles.data(), to.data());
        expect_near(to, expected, 1e-2, 1e-6);
        std::vector<std::int16_t> whole(few.size());
        round_rows(few.data(), few.size(), whole.data());
        EXPECT_EQ(whole, expected_whole);
      });
    }
}

TEST(EntryScan, LooksUpAsTheReferenceDoes) {
  for (const std::size_t groups : {4, 8, 12})
    for (const std::size_t count : {1, 2, 3, 8, 17}) {
      const Codes codes(groups, count);
      for (const std::size_t tokens : kTokens) {
        SCOPED_TRACE(::testing::Message() << groups << " groups, " << count << " codes, " << tokens << " tokens");
        const BlockOfTiles blocks[] = {codes.block(kMostTokens), codes.block(tokens)};
        const std::uint8_t* bytes = look_up_entries(blocks, codes.groups);
        for (const auto& block : blocks) {
          std::vector<std::uint8_t> expected(groups / kTurnGroups * kMostTokens * kTurnColumns);
          reference::look_up_entries(block, codes.groups, expected.data());
          for (std::size_t row = 0; row < groups / kTurnGroups; ++row) {
            const std::size_t at = row * kMostTokens * kTurnColumns;
            EXPECT_TRUE(std::equal(bytes + at, bytes + at + block.tokens * kTurnColumns, expected.data() + at));
          }
          bytes += expected.size();
        }
      }
    }
}

std::vector<std::uint8_t> random_bytes(std::size_t count) {
  Random random(count);
  std::vector<std::uint8_t> bytes(count);
  for (auto& byte : bytes) byte = static_cast<std::uint8_t>(random.below(256));
  return bytes;
}

// Whole numbers: the same on every target.
TEST(EntryScan, ScoresOfBytesAsTheReferenceDoes) {
  for (const std::size_t rows : {1, 2, 3}) {
    const auto bytes = random_bytes(rows * kMostTokens * kTurnColumns);
    const auto angles = whole_numbers(rows * kTurnedTokens * kTurnColumns, 23000, 1),
               offsets = whole_numbers(rows * kTurnColumns, 100 << 6, 3);
    for (const std::size_t queries : {1, 2, 3, 4, 6, 7}) {
      const auto q = whole_numbers(kStretches * rows * queries * kTurnColumns, 500, 2);
      const auto factors = normal_values(queries, 4, 1e-6);
      for (const std::size_t tokens : kTokens) {
        SCOPED_TRACE(::testing::Message() << rows << " rows, " << queries << " queries, " << tokens << " tokens");
        const std::size_t stride = tokens + 3;
        const TurnedQueries turned{q.data(), queries, factors.data()};
        const KeyGrid grid{offsets.data(), 6, angles.data()};
        std::vector<float> expected(queries * stride, 7.0f);
        reference::score_bytes(bytes.data(), tokens, rows, grid, turned, expected.data(), stride);
        for_each_target([&] {
          std::vector<float> scores(expected.size(), 7.0f);
          score_bytes(bytes.data(), tokens, rows, grid, turned, scores.data(), stride);
          EXPECT_EQ(scores, expected);
        });
      }
    }
  }
}

TEST(EntryScan, ScoresOfWideKeysAsTheReferenceDoes) {
  for (const std::size_t rows : {1, 2, 3}) {
    const auto angles = whole_numbers(rows * kTurnedTokens * kTurnColumns, 23000, 1);
    for (const std::size_t queries : {1, 2, 3, 4, 7}) {
      const auto q = whole_numbers(kStretches * rows * queries * kTurnColumns, 500, 2);
      const auto factors = normal_values(queries, 4, 1e-6);
      for (const std::size_t tokens : kTokens) {
        // Behind the last token there is the rest of its stretch.
        const auto keys = whole_numbers((tokens + kTurnedTokens) * rows * kTurnColumns, 16000, 5);
        const TurnedQueries turned{q.data(), queries, factors.data()};
        std::vector<float> expected(queries * tokens);
        reference::score_wide(keys.data(), tokens, rows, {nullptr, 0, angles.data()}, turned, expected.data(), tokens);
        for_each_target([&] {
          std::vector<float> scores(expected.size());
          score_wide(keys.data(), tokens, rows, {nullptr, 0, angles.data()}, turned, scores.data(), tokens);
          EXPECT_EQ(scores, expected);
        });
      }
    }
  }
}

TEST(EntryScan, AddsScoresAsTheReferenceDoes) {
  const std::vector<std::size_t> tokens = {0, 3, 17, 31, 255};
  for (const std::size_t rows : {1, 2, 3})
    for (const std::size_t queries : {1, 2, 3, 4, 7, 11}) {
      const std::size_t columns = rows * kTurnColumns;
      const auto keys = normal_values(tokens.size() * columns, 1, 3000), angles = normal_values(kTurnedTokens * columns, 2),
                 q = normal_values(kStretches * queries * columns, 3), factors = normal_values(queries, 4, 1e-3),
                 before = normal_values(queries * kMostTokens, 5);
      auto expected = before;
      reference::add_scores(keys.data(), tokens, rows, angles.data(), {q.data(), queries, factors.data()}, expected.data(),
                            kMostTokens);
      for_each_target([&] {
        auto scores = before;
        add_scores(keys.data(), tokens, rows, angles.data(), {q.data(), queries, factors.data()}, scores.data(), kMostTokens);
        expect_near(scores, expected, 1e-3, 1e-5);
      });
    }
}

TEST(EntryScan, SumsWideEntriesAsTheReferenceDoes) {
  for (const std::size_t count : {1, 5, 16}) {
    const Codes codes(4, count);
    std::vector<CodePlace> places;
    for (std::size_t code = 0; code < count; ++code) places.push_back(codes.layout.place(code));
    for (const std::size_t rows : {1, 3}) {
      const auto tables = whole_numbers(count * 256 * rows * kTurnColumns, 1900, 1);
      for (const std::size_t tokens : {1, 33, 256}) {
        std::vector<std::int16_t> expected(tokens * rows * kTurnColumns);
        reference::sum_wide_entries(codes.block(tokens), places, tables.data(), rows, expected.data());
        for_each_target([&] {
          std::vector<std::int16_t> keys(expected.size());
          sum_wide_entries(codes.block(tokens), places, tables.data(), rows, keys.data());
          EXPECT_EQ(keys, expected);
        });
      }
    }
  }
}

// Weights in steps of 2⁻¹⁵ of the largest, sums of bytes up to 255.
TEST(EntryScan, AddsBytesAsTheReferenceDoes) {
  for (const std::size_t rows : {1, 2, 3}) {
    const auto bytes = random_bytes(rows * kMostTokens * kTurnColumns);
    for (const std::size_t queries : {1, 2, 3, 4, 5, 7})
      for (const std::size_t tokens : kTokens) {
        SCOPED_TRACE(::testing::Message() << rows << " rows, " << queries << " queries, " << tokens << " tokens");
        const std::size_t stride = tokens + 3;
        const auto weights = normal_values(queries * stride, 1), before = normal_values(queries * rows * kTurnColumns, 2);
        auto expected = before;
        reference::add_bytes(bytes.data(), tokens, rows, weights.data(), queries, stride, expected.data());
        for_each_target([&] {
          auto sums = before;
          add_bytes(bytes.data(), tokens, rows, weights.data(), queries, stride, sums.data());
          expect_near(sums, expected, 4 * 0.5 * 0x1p-15 * 255 * std::sqrt(static_cast<double>(tokens)) + 1e-3, 1e-5);
        });
      }
  }
}

// The largest that whole numbers may be: sums do not overflow.
TEST(EntryScan, LargestSumsFit) {
  const std::vector<std::uint8_t> bytes(kMostTokens * kTurnColumns, 255);
  const std::vector<float> weights(2 * kMostTokens, 1.0f);
  for_each_target([&] {
    std::vector<float> sums(2 * kTurnColumns);
    add_bytes(bytes.data(), kMostTokens, 1, weights.data(), 2, kMostTokens, sums.data());
    for (const float sum : sums) EXPECT_NEAR(sum, 255.0 * kMostTokens, 1);
  });
}

}  // namespace
}  // namespace veloxquant
