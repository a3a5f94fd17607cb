#include "veloxquant/plan/allocation.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "veloxquant/core/error.h"

namespace veloxquant {
namespace {

// Totals closer than this, relatively, count as equal: they differ by the rounding of sums.
constexpr double kTie = 1e-12;

// An average may miss its target by the rounding of the product with the number of layers.
constexpr double kRounding = 1e-9;

// Sums of costs stay far from overflow, and the table of partial solutions within 2 GiB.
constexpr std::int64_t kMaxCost = std::int64_t{1} << 40;
constexpr std::size_t kMaxEntries = std::size_t{1} << 28;

struct Problem {
  std::vector<std::vector<AllocationOption>> units;  // costs above the unit's cheapest, in units of their greatest common divisor
  std::size_t budget;
};

void check(std::span<const std::vector<AllocationOption>> units) {
  for (std::size_t u = 0; u < units.size(); ++u) {
    if (units[u].empty()) throw_invalid("allocate", "unit {}: expected at least one option, got none", u);
    for (const auto& option : units[u]) {
      if (option.cost < 0 || option.cost > kMaxCost)
        throw_invalid("allocate", "unit {}: cost: expected 0 to {}, got {}", u, kMaxCost, option.cost);
      if (!(option.distortion >= 0) || !std::isfinite(option.distortion))
        throw_invalid("allocate", "unit {}: distortion: expected a number from 0, got {}", u, option.distortion);
    }
  }
}

Problem reduce(std::span<const std::vector<AllocationOption>> units, std::int64_t budget) {
  Problem problem;
  std::int64_t least = 0, divisor = 0, spread = 0;
  for (const auto& options : units) {
    const auto by_cost = [](const AllocationOption& a, const AllocationOption& b) { return a.cost < b.cost; };
    const auto [cheapest, dearest] = std::minmax_element(options.begin(), options.end(), by_cost);
    least += cheapest->cost;
    spread += dearest->cost - cheapest->cost;
    problem.units.emplace_back();
    for (const auto& option : options) {
      problem.units.back().push_back({option.cost - cheapest->cost, option.distortion});
      divisor = std::gcd(divisor, option.cost - cheapest->cost);
    }
  }
  if (budget < least) throw_invalid("allocate", "expected a budget from {} to {}, got {}", least, least + spread, budget);
  divisor = std::max<std::int64_t>(divisor, 1);
  for (auto& options : problem.units)
    for (auto& option : options) option.cost /= divisor;
  problem.budget = static_cast<std::size_t>(std::min(budget - least, spread) / divisor);
  return problem;
}

}  // namespace

std::vector<int> allocate(std::span<const std::vector<AllocationOption>> units, std::int64_t budget) {
  check(units);
  const Problem problem = reduce(units, budget);
  const std::size_t width = problem.budget + 1;
  if (width > kMaxEntries / (units.size() + 1))
    throw_invalid("allocate", "{} units times a budget of {} steps is too large", units.size(), problem.budget);
  // best[u][b]: least distortion of units u, u + 1, … with b to spend.  From the last unit to the first, so that walking forward
  // can settle ties in favour of the first units.
  std::vector<std::vector<double>> best(units.size() + 1, std::vector<double>(width, 0.0));
  for (std::size_t u = units.size(); u-- > 0;) {
    auto& row = best[u];
    std::fill(row.begin(), row.end(), std::numeric_limits<double>::infinity());
    for (const auto& option : problem.units[u]) {
      const auto cost = static_cast<std::size_t>(option.cost);
      const double* rest = best[u + 1].data();
      for (std::size_t b = cost; b < width; ++b) row[b] = std::min(row[b], option.distortion + rest[b - cost]);
    }
  }
  std::vector<int> choice;
  std::size_t left = problem.budget;
  for (std::size_t u = 0; u < units.size(); ++u) {
    const double limit = best[u][left] * (1 + kTie);
    int chosen = -1;
    for (std::size_t i = 0; i < problem.units[u].size(); ++i) {
      const auto& option = problem.units[u][i];
      const auto cost = static_cast<std::size_t>(option.cost);
      if (cost > left || option.distortion + best[u + 1][left - cost] > limit) continue;
      if (chosen < 0 || option.cost > problem.units[u][static_cast<std::size_t>(chosen)].cost) chosen = static_cast<int>(i);
    }
    choice.push_back(chosen);
    left -= static_cast<std::size_t>(problem.units[u][static_cast<std::size_t>(chosen)].cost);
  }
  return choice;
}

LayerMap<int> allocate_bits_ratequant(const LayerMap<DistortionCurve>& curves, double target_bits, int min_bits, int max_bits) {
  if (min_bits < 1 || max_bits > 16 || min_bits > max_bits)
    throw_invalid("allocate_bits_ratequant", "expected 1 ≤ min_bits ≤ max_bits ≤ 16, got {} and {}", min_bits, max_bits);
  if (!(target_bits >= min_bits && target_bits <= max_bits))
    throw_invalid("allocate_bits_ratequant", "target_bits: possible are {} to {}, got {}", min_bits, max_bits, target_bits);
  if (curves.empty()) throw_invalid("allocate_bits_ratequant", "expected at least one layer, got none");
  std::vector<std::vector<AllocationOption>> units;
  for (const auto& [name, curve] : curves) {
    units.emplace_back();
    for (int bits = min_bits; bits <= max_bits; ++bits) units.back().push_back({bits, curve(bits)});
  }
  const auto budget = static_cast<std::int64_t>(std::floor(target_bits * static_cast<double>(curves.size()) + kRounding));
  const auto choice = allocate(units, budget);
  LayerMap<int> bits;
  for (const auto& [name, curve] : curves) bits.emplace(name, min_bits + choice[bits.size()]);
  return bits;
}

}  // namespace veloxquant
