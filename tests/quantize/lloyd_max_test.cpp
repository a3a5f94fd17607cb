#include "veloxquant/quantize/lloyd_max.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numbers>
#include <stdexcept>

namespace veloxquant {
namespace {

// Max 1960, table I; his own digits are right to a few in the last place.
TEST(LloydMax, PublishedValues) {
  const struct {
    int bits;
    double first, last, distortion;
  } published[] = {{1, 0.7980, 0.7980, 0.3634},
                   {2, 0.4528, 1.510, 0.1175},
                   {3, 0.2451, 2.152, 0.03454},
                   {4, 0.1284, 2.733, 0.009497},
                   {5, 0.06590, 3.263, 0.002499}};
  for (const auto& row : published) {
    SCOPED_TRACE(row.bits);
    const auto& table = lloyd_max(row.bits);
    EXPECT_NEAR(table.levels[table.levels.size() / 2], row.first, 2e-4);
    EXPECT_NEAR(table.levels.back(), row.last, 1e-3 * row.last);
    EXPECT_NEAR(table.distortion, row.distortion, 3e-3 * row.distortion);
  }
  EXPECT_FLOAT_EQ(lloyd_max(1).levels[1], static_cast<float>(std::sqrt(2 / std::numbers::pi)));
  EXPECT_NEAR(lloyd_max(1).distortion, 1 - 2 / std::numbers::pi, 1e-12);
}

// The two conditions of the optimum and the distortion, by numerical integration.
TEST(LloydMax, LevelsAreMeansOfTheirCells) {
  for (int bits = 1; bits <= 8; ++bits) {
    SCOPED_TRACE(bits);
    const auto& [levels, boundaries, distortion] = lloyd_max(bits);
    ASSERT_EQ(levels.size(), std::size_t{1} << bits);
    ASSERT_EQ(boundaries.size() + 1, levels.size());
    double total = 0;
    for (std::size_t i = 0; i < levels.size(); ++i) {
      EXPECT_FLOAT_EQ(levels[i], -levels[levels.size() - 1 - i]);
      if (i > 0) {
        EXPECT_FLOAT_EQ(boundaries[i - 1], (levels[i - 1] + levels[i]) / 2);
      }
      const double a = i == 0 ? -12.0 : boundaries[i - 1], b = i + 1 == levels.size() ? 12.0 : boundaries[i];
      constexpr int kSteps = 4000;
      double mass = 0, moment = 0;
      for (int step = 0; step < kSteps; ++step) {
        const double x = a + (b - a) * (step + 0.5) / kSteps,
                     weight = std::exp(-x * x / 2) / std::sqrt(2 * std::numbers::pi) * (b - a) / kSteps;
        mass += weight;
        moment += weight * x;
        total += weight * (x - levels[i]) * (x - levels[i]);
      }
      EXPECT_NEAR(moment / mass, levels[i], 1e-5);
    }
    EXPECT_NEAR(total, distortion, 1e-5 * distortion + 1e-9);
  }
}

TEST(LloydMax, BitsOutOfRange) {
  for (const int bits : {-1, 0, 9}) EXPECT_THROW(lloyd_max(bits), std::invalid_argument);
}

}  // namespace
}  // namespace veloxquant
