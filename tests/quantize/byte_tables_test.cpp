#include "veloxquant/quantize/byte_tables.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "tests/quantize/samples.h"
#include "veloxquant/core/random.h"
#include "veloxquant/quantize/additive_codebook.h"

namespace veloxquant {
namespace {

std::vector<std::vector<float>> some_tables(std::size_t stages, std::size_t width, double mean) {
  Random random(7 + width);
  std::vector<std::vector<float>> tables(stages);
  for (std::size_t stage = 0; stage < stages; ++stage)
    for (std::size_t i = 0; i < 256 * width; ++i)
      tables[stage].push_back(static_cast<float>((stage == 0 ? mean : 0.0) + random.normal() / static_cast<double>(1 + stage)));
  return tables;
}

// Each entry is off by less than a step and a half, sums fit into bytes, and offsets are whole.
TEST(ByteTables, RoundToTheGridOfTheirUnit) {
  for (const std::size_t stages : {1, 2})
    for (const std::size_t width : {1, 7, 8, 9, 16, 30})
      for (const double mean : {0.0, -3.0, 500.0}) {
        const auto tables = some_tables(stages, width, mean);
        const auto rounded = round_to_bytes(tables, width);
        ASSERT_EQ(rounded.scales.size(), byte_units(width));
        for (std::size_t column = 0; column < width; ++column) {
          int sum = 0;
          for (std::size_t stage = 0; stage < stages; ++stage) {
            int most = 0;
            EXPECT_EQ(rounded.offsets[stage][column], std::nearbyint(rounded.offsets[stage][column]));
            EXPECT_LE(std::abs(rounded.offsets[stage][column]), kMostByteOffset);
            for (std::size_t entry = 0; entry < 256; ++entry) {
              most = std::max<int>(most, rounded.entries[stage][entry * width + column]);
              EXPECT_NEAR(rounded.value(stage, entry, column), tables[stage][entry * width + column],
                          0.501 * rounded.scale(column) + 1e-4);
            }
            sum += most;
          }
          EXPECT_LE(sum, kMostByteSum);
          EXPECT_LE(std::abs(rounded.offset(column)), kMostByteOffset);
        }
        if (mean == 500.0) continue;
        // The finest grid on which the widest column fits.
        for (std::size_t unit = 0; unit < rounded.scales.size(); ++unit) EXPECT_LT(rounded.scales[unit], 15.0 / 250);
      }
}

TEST(ByteTables, EntriesMayBeAllAlikeOrHuge) {
  for (const float value : {0.0f, -2.5f, 1e38f, -3e38f, 1e-40f}) {
    const std::vector<std::vector<float>> tables(2, std::vector<float>(3 * 4, value));
    const auto rounded = round_to_bytes(tables, 4);
    for (std::size_t stage = 0; stage < 2; ++stage)
      EXPECT_NEAR(rounded.value(stage, 1, 2) / std::max(std::abs(value), 1e-30f), value / std::max(std::abs(value), 1e-30f), 3e-3);
  }
}

// At 2 bits an element: less than 1 % of what storage loses.
TEST(ByteTables, RoundingCostsLittle) {
  constexpr int kWidth = 8;
  constexpr std::size_t kRows = 16384;
  const auto points = testing::gaussian(kRows, kWidth);
  const auto trained =
      AdditiveCodebook::train(points.data(), kRows, kWidth, kWidth, {}, {.stages = 2, .num_centroids = 256, .max_iter = 4});
  std::vector<std::vector<float>> tables;
  for (int stage = 0; stage < 2; ++stage) tables.emplace_back(trained.entry(stage, 0), trained.entry(stage, 0) + 256 * kWidth);
  const auto rounded = round_to_bytes(tables, kWidth);
  std::vector<float> values;
  for (std::size_t stage = 0; stage < 2; ++stage)
    for (std::size_t i = 0; i < 256 * kWidth; ++i) values.push_back(rounded.value(stage, i / kWidth, i % kWidth));
  const auto lost = [&](const AdditiveCodebook& codebook) {
    std::vector<std::uint16_t> codes(2 * kRows);
    codebook.encode(points.data(), kRows, kWidth, codes.data(), 2);
    double sum = 0;
    for (std::size_t row = 0; row < kRows; ++row)
      for (int i = 0; i < kWidth; ++i) {
        const double e = points[row * kWidth + static_cast<std::size_t>(i)] - codebook.entry(0, codes[2 * row])[i] -
                         codebook.entry(1, codes[2 * row + 1])[i];
        sum += e * e;
      }
    return sum;
  };
  const double before = lost(trained), after = lost(AdditiveCodebook(values, 2, 256, kWidth));
  EXPECT_LT(after, 1.01 * before);
}

}  // namespace
}  // namespace veloxquant
