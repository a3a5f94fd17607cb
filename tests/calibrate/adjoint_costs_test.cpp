#include "veloxquant/calibrate/adjoint_costs.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "veloxquant/core/random.h"

namespace veloxquant {
namespace {

constexpr std::size_t kDim = 16, kRows = 512;

UnitStatistics gaussian_unit(double gradient) {
  Random random(7);
  UnitStatistics unit{
      .layer = 0, .side = Side::kKeys, .head = 0, .dim = kDim, .metric = SquareMatrix(kDim * kDim), .training = {}, .held_out = {}};
  for (UnitRows* rows : {&unit.training, &unit.held_out})
    for (std::size_t row = 0; row < kRows; ++row) {
      rows->samples.push_back(static_cast<int>(row / 128));
      for (std::size_t i = 0; i < kDim; ++i) {
        rows->vectors.push_back(static_cast<float>(random.normal()));
        rows->gradients.push_back(static_cast<float>(gradient * random.normal()));
      }
    }
  for (std::size_t i = 0; i < kDim; ++i) unit.metric[i * kDim + i] = 0.01 * static_cast<double>(i + 1);
  return unit;
}

// Restored minus stored, [rows, dim].
std::vector<double> errors_of(const UnitStatistics& unit, const QuantizerParameters& quantizer) {
  std::vector<float> restored(unit.held_out.vectors.size());
  make_quantizer(quantizer)->restore(unit.held_out.vectors, restored);
  std::vector<double> errors;
  for (std::size_t i = 0; i < restored.size(); ++i) errors.push_back(static_cast<double>(restored[i]) - unit.held_out.vectors[i]);
  return errors;
}

double by_metric(const UnitStatistics& unit, const std::vector<double>& errors, std::size_t row) {
  double sum = 0;
  for (std::size_t i = 0; i < kDim; ++i) sum += unit.metric[i * kDim + i] * errors[row * kDim + i] * errors[row * kDim + i];
  return sum;
}

std::vector<std::size_t> worst_first(const UnitStatistics& unit, const std::vector<double>& errors) {
  std::vector<std::size_t> order(kRows);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(),
            [&](std::size_t a, std::size_t b) { return by_metric(unit, errors, a) > by_metric(unit, errors, b); });
  return order;
}

TEST(PredictedCost, PatchesTakeTheRowsOfLargestError) {
  const auto unit = gaussian_unit(0.1);
  const auto quantizer = quick_fit(unit, Rotation::kFull, 3, 1);
  const auto errors = errors_of(unit, quantizer);
  const auto order = worst_first(unit, errors);
  for (const int patches : kPatchCounts) {
    double sum = 0;
    for (std::size_t place = static_cast<std::size_t>(2 * patches); place < kRows; ++place) {
      double product = 0;
      for (std::size_t i = 0; i < kDim; ++i)
        product += errors[order[place] * kDim + i] * unit.held_out.gradients[order[place] * kDim + i];
      sum += product * product / 2;
    }
    EXPECT_NEAR(predicted_cost(unit, quantizer, patches, 4), sum / kRows, 1e-6 * sum / kRows) << patches;
  }
}

TEST(PredictedCost, WhatIsNotHeardOrNeverChangesCostsNothing) {
  constexpr double kConstant = 1e-6;  // entries are bytes, whose offsets are whole: a constant is met to a thousandth
  EXPECT_EQ(predicted_cost(gaussian_unit(0), quick_fit(gaussian_unit(0), Rotation::kFull, 1, 1), 0, 4), 0.0);
  auto constant = gaussian_unit(0.1);
  for (UnitRows* rows : {&constant.training, &constant.held_out})
    for (std::size_t i = 0; i < rows->vectors.size(); ++i) rows->vectors[i] = static_cast<float>(i % kDim) - 5;
  for (const Rotation rotation : {Rotation::kFull, Rotation::kPlane}) {
    const double cost = predicted_cost(constant, quick_fit(constant, rotation, 2, 1), 0, 4);
    EXPECT_GE(cost, 0);
    EXPECT_LT(cost, kConstant);
    const CostLadder ladder(constant, rotation, 1);
    for (int codes = ladder.least_codes(); codes <= ladder.most_codes(); ++codes) EXPECT_LT(ladder.cost(codes, 0), kConstant) << codes;
  }
}

TEST(CostLadder, InterpolatesTheLogarithm) {
  const CostLadder ladder(gaussian_unit(0.1), Rotation::kFull, 1);
  EXPECT_EQ(ladder_codes(kDim), (std::vector<int>{1, 2, 3, 4, 6, 8}));
  for (const int patches : {0, 4})
    EXPECT_NEAR(ladder.cost(5, patches), std::sqrt(ladder.cost(4, patches) * ladder.cost(6, patches)), 1e-12);
}

// Between a rung with a cost and one where patches take all of it.
TEST(CostLadder, NeverRisesWithPatchesWhereTheyTakeEverything) {
  auto unit = gaussian_unit(0.1);
  const auto few = errors_of(unit, quick_fit(unit, Rotation::kFull, 4, 1)),
             many = errors_of(unit, quick_fit(unit, Rotation::kFull, 6, 1));
  const auto order = worst_first(unit, many), before = worst_first(unit, few);
  std::fill(unit.held_out.gradients.begin(), unit.held_out.gradients.end(), 0.0f);
  int heard = 0;
  for (std::size_t place = 0; place < 2; ++place) {
    const std::size_t row = order[place];
    if (row == before[0] || row == before[1]) continue;
    ++heard;
    double inner = 0, square = 0;
    for (std::size_t i = row * kDim; i < (row + 1) * kDim; ++i) inner += few[i] * many[i], square += many[i] * many[i];
    // What it costs at more codes is next to nothing.
    for (std::size_t i = row * kDim; i < (row + 1) * kDim; ++i)
      unit.held_out.gradients[i] = static_cast<float>(few[i] - 0.999 * inner / square * many[i]);
  }
  ASSERT_GT(heard, 0);
  const CostLadder ladder(unit, Rotation::kFull, 1);
  for (int codes = ladder.least_codes(); codes <= ladder.most_codes(); ++codes)
    for (std::size_t p = 1; p < std::size(kPatchCounts); ++p)
      EXPECT_LE(ladder.cost(codes, kPatchCounts[p]), ladder.cost(codes, kPatchCounts[p - 1]))
          << codes << " codes, " << kPatchCounts[p];
}

TEST(RowWeights, AreOneOnAverageAndWhereNothingIsHeard) {
  const auto unit = gaussian_unit(0.1);
  const auto weights = row_weights(unit.training, unit.metric);
  EXPECT_NEAR(std::accumulate(weights.begin(), weights.end(), 0.0) / kRows, 1, 1e-5);
  EXPECT_EQ(row_weights(gaussian_unit(0).training, unit.metric), std::vector<float>(kRows, 1.0f));
  EXPECT_EQ(row_weights(unit.training, SquareMatrix(kDim * kDim)), std::vector<float>(kRows, 1.0f));
}

}  // namespace
}  // namespace veloxquant
