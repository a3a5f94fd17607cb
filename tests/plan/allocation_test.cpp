#include "veloxquant/plan/allocation.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "tests/temporary_folder.h"
#include "veloxquant/core/random.h"

namespace veloxquant {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using testing::message_of;

using Ladders = std::vector<std::vector<AllocationOption>>;

struct Choice {
  std::vector<int> options;
  std::vector<std::int64_t> costs;
  double distortion = 0;

  std::int64_t cost() const { return std::accumulate(costs.begin(), costs.end(), std::int64_t{0}); }
};

Choice choice_of(const Ladders& units, const std::vector<int>& options) {
  Choice choice{.options = options, .costs = {}};
  for (std::size_t u = 0; u < units.size(); ++u) {
    const auto& option = units[u].at(static_cast<std::size_t>(options[u]));
    choice.costs.push_back(option.cost);
    choice.distortion += option.distortion;
  }
  return choice;
}

// Every combination, one after the other.
Choice best_by_search(const Ladders& units, std::int64_t budget) {
  std::vector<int> options(units.size());
  std::optional<Choice> best;
  for (;;) {
    const Choice choice = choice_of(units, options);
    const double tie = best ? 1e-12 * best->distortion : 0;
    if (choice.cost() <= budget && (!best || choice.distortion < best->distortion - tie ||
                                    (choice.distortion <= best->distortion + tie && choice.costs > best->costs)))
      best = choice;
    std::size_t u = 0;
    while (u < units.size() && ++options[u] == static_cast<int>(units[u].size())) options[u++] = 0;
    if (u == units.size()) return *best;
  }
}

std::int64_t least_cost(const Ladders& units) {
  std::int64_t sum = 0;
  for (const auto& options : units) {
    std::int64_t least = options[0].cost;
    for (const auto& option : options) least = std::min(least, option.cost);
    sum += least;
  }
  return sum;
}

void expect_best(const Ladders& units, std::int64_t budget) {
  const Choice found = choice_of(units, allocate(units, budget)), best = best_by_search(units, budget);
  EXPECT_LE(found.cost(), budget);
  EXPECT_NEAR(found.distortion, best.distortion, 1e-11 * best.distortion);
  EXPECT_EQ(found.costs, best.costs) << "budget " << budget;
}

TEST(Allocate, EqualsSearchOnConvexLadders) {
  Random random(1);
  for (int round = 0; round < 60; ++round) {
    Ladders units(1 + random.below(6));
    for (auto& options : units) {
      const double alpha = random.uniform(), beta = 0.5 + random.uniform();
      for (int bits = 1; bits <= 4; ++bits) options.push_back({bits, alpha * std::exp(-beta * bits)});
    }
    for (std::int64_t budget = least_cost(units); budget <= 4 * static_cast<std::int64_t>(units.size()) + 2; ++budget)
      expect_best(units, budget);
  }
}

TEST(Allocate, EqualsSearchOnAnyLadders) {
  Random random(2);
  for (int round = 0; round < 200; ++round) {
    Ladders units(1 + random.below(5));
    const auto step = static_cast<std::int64_t>(1 + random.below(7));
    for (auto& options : units) {
      options.resize(1 + random.below(5));
      for (auto& option : options)
        option = {static_cast<std::int64_t>(random.below(12)) * step + 3, random.normal() * random.normal() + 10};
    }
    for (int i = 0; i < 5; ++i) expect_best(units, least_cost(units) + static_cast<std::int64_t>(random.below(40)) * step / 2);
  }
}

// Distortions from {0, 0.1, 0.2, 0.3}: sums are equal very often, and not to the last bit (0.1 + 0.2 ≠ 0.3).
TEST(Allocate, TiesGoToTheFirstUnits) {
  Random random(3);
  for (int round = 0; round < 200; ++round) {
    Ladders units(2 + random.below(4));
    for (auto& options : units)
      for (int bits = 1; bits <= 4; ++bits) options.push_back({bits, 0.1 * static_cast<double>(random.below(4))});
    for (std::size_t budget = units.size(); budget <= 4 * units.size(); ++budget)
      expect_best(units, static_cast<std::int64_t>(budget));
  }
  const Ladders same(3, {{1, 3.0}, {2, 2.0}, {3, 1.0}});
  EXPECT_EQ(allocate(same, 6), (std::vector<int>{2, 1, 0}));
  const Ladders flat(3, {{1, 0.0}, {2, 0.0}, {3, 0.0}});
  EXPECT_EQ(allocate(flat, 6), (std::vector<int>{2, 1, 0}));
}

TEST(Allocate, EdgesOfTheBudget) {
  const Ladders units = {{{5, 2.0}, {9, 1.0}}, {{7, 2.0}, {17, 1.0}}};
  EXPECT_EQ(allocate(units, 12), (std::vector<int>{0, 0}));
  EXPECT_EQ(allocate(units, 26), (std::vector<int>{1, 1}));
  EXPECT_EQ(allocate(units, std::numeric_limits<std::int64_t>::max()), (std::vector<int>{1, 1}));
  EXPECT_THAT(message_of<std::invalid_argument>([&] { allocate(units, 11); }), AllOf(HasSubstr("12 to 26"), HasSubstr("got 11")));
  EXPECT_THROW(allocate(units, std::numeric_limits<std::int64_t>::min()), std::invalid_argument);
  EXPECT_TRUE(allocate({}, 0).empty());
}

TEST(Allocate, RefusesLaddersThatMakeNoSense) {
  const double nan = std::numeric_limits<double>::quiet_NaN(), infinity = std::numeric_limits<double>::infinity();
  const std::vector<AllocationOption> good = {{1, 1.0}};
  for (const auto& bad :
       Ladders{{}, {{-1, 1.0}}, {{1, nan}}, {{1, -1.0}}, {{1, infinity}}, {{std::numeric_limits<std::int64_t>::max(), 1.0}}})
    EXPECT_THAT(message_of<std::invalid_argument>([&] { allocate(Ladders{good, bad}, 10); }), HasSubstr("unit 1"));
  const Ladders huge = {{{0, 1.0}, {1, 0.5}}, {{0, 1.0}, {std::int64_t{1} << 40, 0.0}}};
  EXPECT_THAT(message_of<std::invalid_argument>([&] { allocate(huge, std::int64_t{1} << 39); }), HasSubstr("too large"));
}

// No single exchange of a bit between two units, nor a bit more for one, may help where the budget allows it.
TEST(Allocate, ManyUnits) {
  Random random(4);
  Ladders units(500);
  for (auto& options : units) {
    const double alpha = std::exp(2 * random.normal());
    for (int bits = 1; bits <= 8; ++bits) options.push_back({bits, alpha * std::exp(-1.3 * bits)});
  }
  const std::int64_t budget = 1437;
  const auto chosen = allocate(units, budget);
  EXPECT_EQ(choice_of(units, chosen).cost(), budget);
  double most_saved = 0, least_gain = std::numeric_limits<double>::infinity();
  for (std::size_t u = 0; u < units.size(); ++u) {
    const auto at = [&](int option) { return units[u][static_cast<std::size_t>(option)].distortion; };
    if (chosen[u] < 7) most_saved = std::max(most_saved, at(chosen[u]) - at(chosen[u] + 1));
    if (chosen[u] > 0) least_gain = std::min(least_gain, at(chosen[u] - 1) - at(chosen[u]));
  }
  EXPECT_LE(most_saved, least_gain);
}

LayerMap<DistortionCurve> random_curves(Random& random, int layers) {
  LayerMap<DistortionCurve> curves;
  for (int i = 0; i < layers; ++i)
    curves[layer_name(i)] = {
        .layer_name = layer_name(i), .alpha = random.below(5) == 0 ? 0.0 : random.uniform(), .beta = 0.3 + random.uniform()};
  return curves;
}

TEST(AllocateBits, EqualsSearch) {
  Random random(5);
  for (int round = 0; round < 60; ++round) {
    const auto layers = 1 + static_cast<int>(random.below(6));
    const int min_bits = 1 + static_cast<int>(random.below(3)), max_bits = min_bits + static_cast<int>(random.below(4));
    const auto curves = random_curves(random, layers);
    const double target = min_bits + (max_bits - min_bits) * random.uniform();
    Ladders units;
    for (const auto& [name, curve] : curves) {
      units.emplace_back();
      for (int bits = min_bits; bits <= max_bits; ++bits) units.back().push_back({bits, curve(bits)});
    }
    const auto best = best_by_search(units, static_cast<std::int64_t>(std::floor(target * layers)));
    std::vector<std::int64_t> found;
    for (const auto& [name, bits] : allocate_bits_ratequant(curves, target, min_bits, max_bits)) found.push_back(bits);
    EXPECT_EQ(found, best.costs);
  }
}

TEST(AllocateBits, KeepsOrderAndDefaults) {
  Random random(6);
  const auto bits = allocate_bits_ratequant(random_curves(random, 24));
  int expected = 0, sum = 0;
  for (const auto& [name, value] : bits) {
    EXPECT_EQ(name, layer_name(expected++));
    EXPECT_GE(value, 1);
    EXPECT_LE(value, 4);
    sum += value;
  }
  EXPECT_EQ(expected, 24);
  EXPECT_EQ(sum, 48);
}

// 2.3 · 10 and the like fall short of the whole number by rounding.
TEST(AllocateBits, AnAverageExactlyAtTheTargetIsAllowed) {
  for (int layers = 1; layers <= 60; ++layers) {
    LayerMap<DistortionCurve> curves;
    for (int i = 0; i < layers; ++i) curves[layer_name(i)] = {.layer_name = layer_name(i), .alpha = 1.0 + i, .beta = 1.0};
    for (int sum = layers; sum <= 4 * layers; ++sum) {
      int found = 0;
      for (const auto& [name, bits] : allocate_bits_ratequant(curves, static_cast<double>(sum) / layers)) found += bits;
      ASSERT_EQ(found, sum) << layers << " layers";
    }
  }
}

TEST(AllocateBits, EqualLayersAreServedInOrder) {
  LayerMap<DistortionCurve> same, zero;
  for (int i = 0; i < 12; ++i) {
    same[layer_name(i)] = {.layer_name = layer_name(i), .alpha = 0.7, .beta = 1.1};
    zero[layer_name(i)] = {.layer_name = layer_name(i), .alpha = 0, .beta = 1.1};
  }
  for (const auto& [name, bits] : allocate_bits_ratequant(same, 2.5)) EXPECT_EQ(bits, layer_index(name) < 6 ? 3 : 2);
  for (const auto& [name, bits] : allocate_bits_ratequant(zero, 2.0)) EXPECT_EQ(bits, layer_index(name) < 4 ? 4 : 1);
}

TEST(AllocateBits, RefusesAndSaysWhatIsPossible) {
  Random random(7);
  const auto curves = random_curves(random, 3);
  const auto problem = [&](double target, int min_bits, int max_bits) {
    return message_of<std::invalid_argument>([&] { allocate_bits_ratequant(curves, target, min_bits, max_bits); });
  };
  for (const double target : {0.99, 4.01, -1.0, std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()})
    EXPECT_THAT(problem(target, 1, 4), AllOf(HasSubstr("target_bits"), HasSubstr("1 to 4"))) << target;
  EXPECT_THAT(problem(2, 0, 4), HasSubstr("min_bits"));
  EXPECT_THAT(problem(2, 1, 17), HasSubstr("max_bits"));
  EXPECT_THAT(problem(2, 3, 2), HasSubstr("min_bits"));
  EXPECT_THROW(allocate_bits_ratequant({}), std::invalid_argument);
  EXPECT_NO_THROW(allocate_bits_ratequant(curves, 1.0));
  EXPECT_NO_THROW(allocate_bits_ratequant(curves, 4.0));
  auto broken = curves;
  broken["layer_1"].alpha = std::numeric_limits<double>::quiet_NaN();
  EXPECT_THROW(allocate_bits_ratequant(broken), std::invalid_argument);
}

}  // namespace
}  // namespace veloxquant
