#include "veloxquant/plan/allocation.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>

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

// Costs of the best choice by a table of units · budget.
std::vector<std::int64_t> costs_by_table(const Ladders& units, std::size_t budget) {
  std::vector<std::vector<double>> best(units.size() + 1, std::vector<double>(budget + 1));
  for (std::size_t u = units.size(); u-- > 0;)
    for (std::size_t b = 0; b <= budget; ++b) {
      best[u][b] = std::numeric_limits<double>::infinity();
      for (const auto& option : units[u])
        if (const auto cost = static_cast<std::size_t>(option.cost); cost <= b)
          best[u][b] = std::min(best[u][b], option.distortion + best[u + 1][b - cost]);
    }
  std::vector<std::int64_t> costs;
  double allowed = best[0][budget] * (1 + 1e-12);
  for (std::size_t u = 0; u < units.size(); ++u) {
    const AllocationOption* chosen = nullptr;
    for (const auto& option : units[u]) {
      const auto cost = static_cast<std::size_t>(option.cost);
      if (cost <= budget && option.distortion + best[u + 1][budget - cost] <= allowed && (!chosen || option.cost > chosen->cost))
        chosen = &option;
    }
    costs.push_back(chosen->cost);
    budget -= static_cast<std::size_t>(chosen->cost);
    allowed -= chosen->distortion;
  }
  return costs;
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
  EXPECT_THAT(message_of<std::invalid_argument>([&] { allocation_frontier(Ladders{good, {}}); }), HasSubstr("unit 1"));
}

// Costs without a common divisor, options that others beat, distortions over many orders of magnitude.
TEST(Allocate, EqualsSearchOnLargeCosts) {
  Random random(8);
  for (int round = 0; round < 300; ++round) {
    Ladders units(1 + random.below(6));
    const std::uint64_t range = std::uint64_t{1} << (4 + random.below(37));
    for (auto& options : units) {
      options.resize(1 + random.below(5));
      for (auto& option : options)
        option = {static_cast<std::int64_t>(random.below(range)), std::pow(10.0, 8 * random.uniform() - 4)};
    }
    for (int i = 0; i < 5; ++i)
      expect_best(units, least_cost(units) + static_cast<std::int64_t>(random.below(range * units.size())));
  }
  const Ladders far = {{{0, 1.0}, {1, 0.5}}, {{0, 1.0}, {std::int64_t{1} << 40, 0.0}}};
  expect_best(far, std::int64_t{1} << 39);
  expect_best(far, std::int64_t{1} << 40);
}

TEST(Allocate, EqualsTheTable) {
  Random random(9);
  for (int round = 0; round < 60; ++round) {
    const bool ties = round % 3 == 0, same = round % 5 == 0;
    Ladders units(10 + random.below(60));
    for (auto& options : units) {
      options.resize(1 + random.below(12));
      for (auto& option : options)
        option = {static_cast<std::int64_t>(random.below(40)),
                  ties ? 0.1 * static_cast<double>(random.below(5)) : std::exp(2 * random.normal())};
    }
    if (same) std::ranges::fill(units, units[0]);
    for (int i = 0; i < 5; ++i) {
      const std::int64_t budget = least_cost(units) + static_cast<std::int64_t>(random.below(units.size() * 20));
      EXPECT_EQ(choice_of(units, allocate(units, budget)).costs, costs_by_table(units, static_cast<std::size_t>(budget)));
    }
  }
}

// Rounded down the relaxation leaves 1e13 here, the best choice 20: differences of 1e-9 count all the same.
TEST(Allocate, SmallTotalsBesideLargeDistortions) {
  const std::int64_t most = std::int64_t{1} << 40;
  const Ladders far = {{{0, 1e13}, {most - 2, 20.0}, {most - 1, 20.0 + 1e-9}, {most, 0.0}}};
  expect_best(far, most - 2);
  expect_best(far, most - 1);
  const Ladders nothing_left = {{{0, 1e300}, {6, 0.0}, {9, 0.0}}, {{0, 1e-300}, {2, 0.0}}};
  for (std::int64_t budget = 0; budget <= 12; ++budget) expect_best(nothing_left, budget);
}

// 126 layers · 8 heads · 2 sides at 131,072 tokens.
class AllocateLarge : public ::testing::TestWithParam<std::string> {
 protected:
  static constexpr std::size_t kUnits = 2016, kOptions = 40, kRange = 3'000'000;

  static std::vector<AllocationOption> ladder(Random& random) {
    std::vector<AllocationOption> options(kOptions);
    const double scale = std::exp(2 * random.normal());
    for (auto& [cost, distortion] : options) {
      cost = static_cast<std::int64_t>(random.below(kRange));
      distortion = scale * std::exp(-8 * static_cast<double>(cost) / kRange + 0.7 * random.normal());
    }
    return options;
  }

  static Ladders units() {
    Random random(10);
    Ladders units;
    for (std::size_t u = 0; u < kUnits; ++u) units.push_back(GetParam() == "alike" && u > 0 ? units[0] : ladder(random));
    for (auto& options : units) {
      const double magnitude = std::pow(10.0, 12 * random.uniform());
      for (auto& [cost, distortion] : options) {
        if (GetParam() == "nothing_lost") distortion = 0;
        if (GetParam() == "equal_costs") cost = 1000;
        if (GetParam() == "magnitudes") distortion *= magnitude;
      }
    }
    return units;
  }
};

// The total lies between the hull and its last point within the budget; nothing left over would buy a better option.
TEST_P(AllocateLarge, IsNearTheHullAndLeavesNothing) {
  const Ladders units = this->units();
  const auto frontier = allocation_frontier(units);
  for (const double part : {0.1, 0.3, 0.6, 1.0}) {
    const std::int64_t least = frontier.front().cost;
    const std::int64_t budget = least + static_cast<std::int64_t>(part * static_cast<double>(frontier.back().cost - least));
    const Choice choice = choice_of(units, allocate(units, budget));
    const std::int64_t left = budget - choice.cost();
    EXPECT_GE(left, 0);
    const auto above = std::ranges::upper_bound(frontier, budget, {}, &AllocationOption::cost);
    const auto whole = std::prev(above);
    EXPECT_LE(choice.distortion, whole->distortion * (1 + 1e-11));
    if (above != frontier.end()) {
      const double share = static_cast<double>(budget - whole->cost) / static_cast<double>(above->cost - whole->cost);
      EXPECT_GE(choice.distortion, std::lerp(whole->distortion, above->distortion, share) * (1 - 1e-11));
    }
    for (std::size_t u = 0; u < kUnits; ++u) {
      const auto& chosen = units[u][static_cast<std::size_t>(choice.options[u])];
      for (const auto& option : units[u]) {
        const double saved = option.cost - chosen.cost <= left ? chosen.distortion - option.distortion : 0;
        EXPECT_LE(saved, 1e-11 * choice.distortion);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, AllocateLarge, ::testing::Values("different", "alike", "nothing_lost", "equal_costs", "magnitudes"),
                         [](const auto& info) { return info.param; });

// All choices lie on the hull, so none can be left out; which of them fills the budget is a sum of subsets.
TEST(Allocate, SaysWhatIsTooLarge) {
  Random random(11);
  Ladders units(40);
  for (auto& options : units) {
    const auto cost = static_cast<std::int64_t>(random.next() >> 24);
    options = {{0, 1e13}, {cost, 1e13 - static_cast<double>(cost)}};
  }
  EXPECT_THAT(message_of<std::invalid_argument>([&] { allocate(units, std::int64_t{1} << 43); }), HasSubstr("too large"));
}

TEST(AllocationFrontier, IsTheHullOfAllChoices) {
  Random random(12);
  for (int round = 0; round < 100; ++round) {
    Ladders units(1 + random.below(5));
    for (auto& options : units) {
      options.resize(1 + random.below(5));
      for (auto& option : options) option = {static_cast<std::int64_t>(3 + random.below(30)), std::exp(3 * random.normal())};
    }
    const auto frontier = allocation_frontier(units);
    EXPECT_EQ(frontier.front().cost, least_cost(units));
    for (std::size_t i = 0; i < frontier.size(); ++i) {
      const auto& [cost, distortion] = frontier[i];
      const Choice best = best_by_search(units, cost);
      EXPECT_NEAR(distortion, best.distortion, 1e-12 * distortion);
      if (i == 0) continue;
      const auto& last = frontier[i - 1];
      EXPECT_GT(cost, last.cost);
      EXPECT_LT(distortion, last.distortion);
      for (std::int64_t between = last.cost; between < cost; ++between) {
        const double share = static_cast<double>(between - last.cost) / static_cast<double>(cost - last.cost);
        EXPECT_GE(best_by_search(units, between).distortion, std::lerp(last.distortion, distortion, share) * (1 - 1e-12));
      }
    }
    EXPECT_NEAR(frontier.back().distortion, best_by_search(units, 1000).distortion, 1e-12 * frontier.back().distortion);
  }
}

TEST(AllocationFrontier, Edges) {
  const auto only = allocation_frontier(Ladders{{{4, 1.0}}, {{5, 2.0}, {7, 2.0}, {5, 3.0}}});
  ASSERT_EQ(only.size(), 1u);
  EXPECT_EQ(only[0].cost, 9);
  EXPECT_EQ(only[0].distortion, 3.0);
  EXPECT_EQ(allocation_frontier({}).size(), 1u);
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
