#include "veloxquant/calibrate/width_allocation.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "veloxquant/core/random.h"
#include "veloxquant/plan/plan.h"

namespace veloxquant {
namespace {

constexpr int kContext = 1000, kExact = 36;

ModelConfig small_config() {
  ModelConfig config;
  config.num_layers = 1;
  config.num_kv_heads = 2;
  config.head_dim = 16;
  return config;
}

UnitStatistics some_unit(Side side, int head, double gradient) {
  Random random(static_cast<std::uint64_t>(10 * head) + (side == Side::kKeys ? 1 : 2));
  UnitStatistics unit{
      .layer = 0, .side = side, .head = head, .dim = 16, .metric = SquareMatrix(16 * 16), .training = {}, .held_out = {}};
  for (UnitRows* rows : {&unit.training, &unit.held_out})
    for (int row = 0; row < 512; ++row) {
      rows->samples.push_back(0);
      for (int i = 0; i < 16; ++i) {
        rows->vectors.push_back(static_cast<float>(random.normal() * (i % 4 == head ? 3 : 1)));
        rows->gradients.push_back(static_cast<float>(gradient * random.normal()));
      }
    }
  for (std::size_t i = 0; i < 16; ++i) unit.metric[i * 16 + i] = gradient * gradient;
  return unit;
}

// Keys of both heads, then values.
std::vector<MeasuredUnit> some_units() {
  std::vector<MeasuredUnit> units;
  double gradient = 0.4;
  for (const Side side : {Side::kKeys, Side::kValues})
    for (int head = 0; head < 2; ++head, gradient /= 3)
      units.push_back({0, head, side, CostLadder(some_unit(side, head, gradient), Rotation::kFull, 1)});
  return units;
}

WidthAllocation allocation(const std::vector<MeasuredUnit>& units, Units kind) {
  return {small_config(), units, kind, kContext, kExact};
}

// Of a plan with these widths, by what plans count.
std::int64_t bytes_of_plan(const std::vector<Width>& widths) {
  const std::size_t exact = make_quantizer(exact_parameters(Side::kKeys, 16))->encoded_bytes(kExact);
  std::size_t bytes = 0;
  for (const auto& width : widths) bytes += exact + rotated_pq_bytes(16, width.codes, width.patches, kContext - kExact);
  return static_cast<std::int64_t>(bytes);
}

double cost_of(const std::vector<MeasuredUnit>& units, const std::vector<Width>& widths) {
  double cost = 0;
  for (std::size_t i = 0; i < units.size(); ++i) cost += units[i].ladder.cost(widths[i].codes, widths[i].patches);
  return cost;
}

// Least cost of every choice of widths for every unit.
double least_cost(const std::vector<MeasuredUnit>& units, std::int64_t budget) {
  struct Choice {
    std::int64_t bytes;
    double cost;
  };
  std::vector<Choice> pairs[2];
  for (std::size_t half = 0; half < 2; ++half) {
    std::vector<Choice> of[2];
    for (std::size_t u = 0; u < 2; ++u)
      for (int codes = units[0].ladder.least_codes(); codes <= units[0].ladder.most_codes(); ++codes)
        for (const int patches : kPatchCounts)
          of[u].push_back({bytes_of_plan({{codes, patches}}), units[2 * half + u].ladder.cost(codes, patches)});
    for (const auto& a : of[0])
      for (const auto& b : of[1]) pairs[half].push_back({a.bytes + b.bytes, a.cost + b.cost});
  }
  double least = std::numeric_limits<double>::infinity();
  for (const auto& a : pairs[0])
    for (const auto& b : pairs[1])
      if (a.bytes + b.bytes <= budget) least = std::min(least, a.cost + b.cost);
  return least;
}

TEST(WidthAllocation, IsTheBestOfAllChoices) {
  const auto units = some_units();
  const auto heads = allocation(units, Units::kHead);
  for (const double bits : {1.6, 2.5, 3.7}) {
    const auto budget = heads.bytes_of(bits);
    const auto widths = heads.solve(budget);
    EXPECT_LE(bytes_of_plan(widths), budget);
    const double least = least_cost(units, budget);
    EXPECT_NEAR(cost_of(units, widths), least, 1e-9 * least) << bits;
  }
}

TEST(WidthAllocation, UnitsShareWidthsAndFinerOnesAreNeverWorse) {
  const auto units = some_units();
  double finer = 0;
  for (const Units kind : {Units::kHead, Units::kKv, Units::kLayer, Units::kUniform}) {
    const auto some = allocation(units, kind);
    const auto budget = some.bytes_of(2.2);
    const auto widths = some.solve(budget);
    EXPECT_LE(bytes_of_plan(widths), budget);
    if (kind != Units::kHead) {
      EXPECT_EQ(widths[0], widths[1]);
      EXPECT_EQ(widths[2], widths[3]);
    }
    if (kind == Units::kLayer || kind == Units::kUniform) {
      EXPECT_EQ(widths[0], widths[2]);
    }
    EXPECT_GE(cost_of(units, widths), finer * (1 - 1e-12));
    finer = cost_of(units, widths);
  }
}

TEST(WidthAllocation, CountsBytesAsPlansDo) {
  const auto units = some_units();
  const auto heads = allocation(units, Units::kHead);
  const auto [least, most] = possible_bytes(small_config(), static_cast<std::size_t>(small_config().num_layers), kContext, kExact);
  EXPECT_EQ(least, bytes_of_plan(std::vector<Width>(4, {1, 0})));
  EXPECT_EQ(most, bytes_of_plan(std::vector<Width>(4, {8, 16})));
  EXPECT_EQ(heads.solve(least), std::vector<Width>(4, {1, 0}));
  EXPECT_NO_THROW(heads.solve(most));
  EXPECT_THROW(heads.solve(least - 1), std::invalid_argument);
  for (const std::int64_t bytes : {least, least + 1, (least + most) / 2, most})
    EXPECT_EQ(heads.bytes_of(heads.bits_of(bytes)), bytes);

  const auto widths = heads.solve((least + most) / 3);
  Plan plan;
  plan.model.num_layers = 1;
  plan.model.num_kv_heads = 2;
  plan.model.head_dim = 16;
  plan.window = 32;
  plan.sinks = kExact - 32;
  plan.provenance.context = kContext;
  for (std::size_t i = 0; i < units.size(); ++i) {
    const auto unit = some_unit(units[i].side, units[i].head, 1);
    auto quantizer = quick_fit(unit, Rotation::kFull, widths[i].codes, 1);
    quantizer.numbers["patches"] = widths[i].patches;
    plan.units.push_back({0, units[i].side, quantizer, units[i].head});
  }
  EXPECT_EQ(cache_bytes(plan, kContext), bytes_of_plan(widths));
  EXPECT_DOUBLE_EQ(effective_bits(plan), heads.bits_of(bytes_of_plan(widths)));
}

TEST(WidthAllocation, FrontierFallsFromTheLeastToTheBest) {
  const auto units = some_units();
  const auto heads = allocation(units, Units::kHead);
  const auto frontier = heads.frontier();
  ASSERT_GT(frontier.size(), 4u);
  for (std::size_t i = 1; i < frontier.size(); ++i) {
    EXPECT_GT(frontier[i].bits, frontier[i - 1].bits);
    EXPECT_LT(frontier[i].predicted_kl, frontier[i - 1].predicted_kl);
  }
  EXPECT_DOUBLE_EQ(
      frontier.front().bits,
      heads.bits_of(possible_bytes(small_config(), static_cast<std::size_t>(small_config().num_layers), kContext, kExact).least));
  for (const auto& [bits, kl] : {frontier[1], frontier[frontier.size() / 2]})
    EXPECT_NEAR(cost_of(units, heads.solve(heads.bytes_of(bits))), kl, 1e-9 * kl);  // a corner is a choice
}

}  // namespace
}  // namespace veloxquant
