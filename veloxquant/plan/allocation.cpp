#include "veloxquant/plan/allocation.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <numeric>
#include <utility>

#include "veloxquant/core/error.h"

namespace veloxquant {
namespace {

// Totals closer than this, relatively, count as equal: they differ by the rounding of sums.
constexpr double kTie = 1e-12;

// An average may miss its target by the rounding of the product with the number of layers.
constexpr double kRounding = 1e-9;

// Plain sums of many distortions are off by less, relatively.
constexpr double kSums = 1e-9;

// Sums stay far from overflow, and the partial solutions that are kept within 512 MiB.
constexpr std::int64_t kMaxCost = std::int64_t{1} << 40;
constexpr double kMaxDistortion = 1e300;
constexpr std::size_t kMaxPoints = std::size_t{1} << 25;

using Wide = __int128;
constexpr Wide kNever = Wide{1} << 120;

void check(const char* where, std::span<const std::vector<AllocationOption>> units) {
  for (std::size_t u = 0; u < units.size(); ++u) {
    if (units[u].empty()) throw_invalid(where, "unit {}: expected at least one option, got none", u);
    for (const auto& option : units[u]) {
      if (option.cost < 0 || option.cost > kMaxCost)
        throw_invalid(where, "unit {}: cost: expected 0 to {}, got {}", u, kMaxCost, option.cost);
      if (!(option.distortion >= 0 && option.distortion <= kMaxDistortion))
        throw_invalid(where, "unit {}: distortion: expected 0 to {}, got {}", u, kMaxDistortion, option.distortion);
    }
  }
}

// From one vertex of a unit's lower convex hull to the next: `cost` more for `distortion` less.
template <class Number>
struct Step {
  std::int64_t cost;
  Number distortion;
  std::size_t unit;
};

bool steeper(const Step<double>& a, const Step<double>& b) {
  return a.distortion / static_cast<double>(a.cost) > b.distortion / static_cast<double>(b.cost);
}

bool steeper(const Step<std::int64_t>& a, const Step<std::int64_t>& b) {
  return Wide{a.distortion} * b.cost > Wide{b.distortion} * a.cost;
}

// Where choices may be mixed, the start and as many steps as a budget allows, the last one in part, leave the least distortion.
template <class Option>
struct Relaxation {
  std::vector<Option> start;                              // [units], the cheapest options
  std::vector<Step<decltype(Option::distortion)>> steps;  // steepest first
};

template <class Option>
Relaxation<Option> relax(std::span<const std::vector<Option>> units) {
  Relaxation<Option> result;
  auto& steps = result.steps;
  for (std::size_t u = 0; u < units.size(); ++u) {
    auto options = units[u];
    std::ranges::sort(options, {}, [](const Option& option) { return std::pair(option.cost, option.distortion); });
    const std::size_t first = steps.size();
    Option last = options[0];
    result.start.push_back(last);
    for (const auto& option : options) {
      if (option.distortion >= last.distortion) continue;
      Step<decltype(Option::distortion)> step{option.cost - last.cost, last.distortion - option.distortion, u};
      for (; steps.size() > first && !steeper(steps.back(), step); steps.pop_back()) {
        step.cost += steps.back().cost;
        step.distortion += steps.back().distortion;
      }
      steps.push_back(step);
      last = option;
    }
  }
  std::ranges::stable_sort(steps, [](const auto& a, const auto& b) { return steeper(a, b); });
  return result;
}

struct Problem {
  std::vector<std::vector<AllocationOption>> units;  // costs above the unit's cheapest, in units of their greatest common divisor
  std::int64_t budget;
};

Problem reduce(std::span<const std::vector<AllocationOption>> units, std::int64_t budget) {
  Problem problem;
  std::int64_t least = 0, divisor = 0, spread = 0;
  for (const auto& options : units) {
    const auto [cheapest, dearest] = std::ranges::minmax(options, {}, &AllocationOption::cost);
    least += cheapest.cost;
    spread += dearest.cost - cheapest.cost;
    problem.units.emplace_back();
    for (const auto& option : options) {
      problem.units.back().push_back({option.cost - cheapest.cost, option.distortion});
      divisor = std::gcd(divisor, option.cost - cheapest.cost);
    }
  }
  if (budget < least) throw_invalid("allocate", "expected a budget from {} to {}, got {}", least, least + spread, budget);
  divisor = std::max<std::int64_t>(divisor, 1);
  for (auto& options : problem.units)
    for (auto& option : options) option.cost /= divisor;
  problem.budget = std::min(budget - least, spread) / divisor;
  return problem;
}

// An option whose distortion is a whole number of quanta, so that sums are exact and equal ones meet.
struct WholeOption {
  std::int64_t cost, distortion;
  int index;  // in the caller's ladder
};
using WholeUnits = std::vector<std::vector<WholeOption>>;

// What a choice for some units costs and leaves.
struct Point {
  std::int64_t cost, distortion;
};
using Frontier = std::vector<Point>;  // by rising cost and falling distortion

// The best choice that takes the relaxation's steps whole, as far as a budget goes.
struct Rounded {
  explicit Rounded(const Relaxation<WholeOption>& relaxation) : step(relaxation.steps.begin()), end(relaxation.steps.end()) {
    for (const auto& option : relaxation.start) {
      cost += option.cost;
      distortion += option.distortion;
    }
  }

  void spend(std::int64_t budget) {
    for (; step != end && step->cost <= budget - cost; ++step) {
      cost += step->cost;
      distortion -= step->distortion;
    }
  }

  std::int64_t cost = 0;
  Wide distortion = 0;
  std::vector<Step<std::int64_t>>::const_iterator step, end;  // the first step that it does not take
};

// `frontier`, and `rest` with `option` on top, without what another choice beats.
Frontier merge(const Frontier& frontier, const Frontier& rest, const WholeOption& option) {
  Frontier result;
  result.reserve(frontier.size() + rest.size());
  const auto add = [&](const Point& point) {
    if (result.empty() || point.distortion < result.back().distortion) result.push_back(point);
  };
  auto old = frontier.begin();
  for (const auto& [cost, distortion] : rest) {
    const Point point{cost + option.cost, distortion + option.distortion};
    for (; old != frontier.end() && std::pair(old->cost, old->distortion) < std::pair(point.cost, point.distortion); ++old)
      add(*old);
    add(point);
  }
  for (; old != frontier.end(); ++old) add(*old);
  return result;
}

// Whether a choice costs and leaves at most so much.
bool reaches(const Frontier& frontier, std::int64_t cost, std::int64_t distortion) {
  const auto above = std::ranges::upper_bound(frontier, cost, {}, &Point::cost);
  return above != frontier.begin() && std::prev(above)->distortion <= distortion;
}

// Dynamic programming over the choices whose total can be at most `limit`, which some choice must reach.
//
// Units are decided from the last to the first, so that walking forward can settle ties in favour of the first units.  Of the
// partial solutions those stay that, with the relaxation of the units before, do not exceed the best total known (and ties with
// it), but at most `width` of them.  Each, with that relaxation rounded down to whole steps, is also a solution, so the best total
// known falls on the way.
class Search {
 public:
  Search(const Problem& problem, double limit, std::size_t width) : budget_(problem.budget), width_(width) {
    // 1/16: roundings, half a quantum a unit, must not part totals that tie, even a quarter of the limit.
    const auto count = static_cast<double>(problem.units.size());
    quantum_ = limit * std::max(kTie / (16 * count), 0x1p-61);
    best_ = whole(limit + count * quantum_);
    for (const auto& options : problem.units) {
      units_.emplace_back();
      for (int i = 0; const auto& [cost, distortion] : options) {
        if (distortion <= limit * (1 + 2 * kTie)) units_.back().push_back({cost, whole(distortion), i});
        ++i;
      }
    }
    drop_hopeless();
    explore();
  }

  /// Whether nothing was left out for `width`, so that choice() is the best.
  bool complete() const { return complete_; }

  /// A total that some choice does not exceed.
  double total() const { return (static_cast<double>(best_) + static_cast<double>(units_.size())) * quantum_; }

  std::vector<int> choice() const {
    std::vector<int> result;
    std::int64_t budget = budget_, allowed = best_ + static_cast<std::int64_t>(kTie * static_cast<double>(best_));
    const Frontier* rest = solutions_.data();
    for (const auto& options : units_) {
      const WholeOption* chosen = &options[0];
      if (options.size() > 1) {
        ++rest;
        chosen = nullptr;
        for (const auto& option : options)
          if (reaches(*rest, budget - option.cost, allowed - option.distortion) && (!chosen || option.cost > chosen->cost))
            chosen = &option;
        assert(chosen);
        budget -= chosen->cost;
        allowed -= chosen->distortion;
      }
      result.push_back(chosen->index);
    }
    return result;
  }

 private:
  std::int64_t whole(double distortion) const { return quantum_ > 0 ? std::llround(distortion / quantum_) : 0; }

  // The highest total of interest: ties count, with some room for rounding.
  Wide ceiling() const { return Wide{best_} + static_cast<std::int64_t>(2 * kTie * static_cast<double>(best_)); }

  // With the price of cost at which the relaxation's budget is spent, an option that is dearer than its unit's best by more than
  // the gap between the relaxation and the best total is in no solution of interest.
  void drop_hopeless() {
    const auto relaxation = relax<WholeOption>(units_);
    Rounded rounded(relaxation);
    rounded.spend(budget_);
    best_ = static_cast<std::int64_t>(std::min<Wide>(best_, rounded.distortion));
    const auto price = rounded.step != rounded.end ? *rounded.step : Step<std::int64_t>{1, 0, 0};
    const auto priced = [&](const WholeOption& option) {
      return Wide{option.distortion} * price.cost + Wide{option.cost} * price.distortion;
    };
    std::vector<Wide> least;
    Wide gap = ceiling() * price.cost + Wide{budget_} * price.distortion;
    for (const auto& options : units_) {
      least.push_back(priced(*std::ranges::min_element(options, {}, priced)));
      gap -= least.back();
    }
    for (std::size_t u = 0; u < units_.size(); ++u)
      std::erase_if(units_[u], [&](const WholeOption& option) { return priced(option) - least[u] > gap; });
  }

  void explore() {
    WholeUnits open;
    Point decided{0, 0};
    for (const auto& options : units_) {
      if (options.size() > 1) {
        open.push_back(options);
      } else {
        decided.cost += options[0].cost;
        decided.distortion += options[0].distortion;
      }
    }
    auto before = relax<WholeOption>(open);
    solutions_.resize(open.size() + 1);
    solutions_.back() = {decided};
    std::size_t points = 0;
    for (std::size_t u = open.size(); u-- > 0;) {
      for (const auto& option : open[u]) {
        solutions_[u] = merge(solutions_[u], solutions_[u + 1], option);
        if (points + solutions_[u].size() > kMaxPoints)
          throw_invalid("allocate", "{} units with a budget of {} steps are too large: more than {} partial solutions",
                        units_.size(), budget_, kMaxPoints);
      }
      before.start.pop_back();
      std::erase_if(before.steps, [&](const auto& step) { return step.unit == u; });
      prune(solutions_[u], before);
      points += solutions_[u].size();
    }
    if (complete_) best_ = solutions_[0].back().distortion;
  }

  void prune(Frontier& frontier, const Relaxation<WholeOption>& before) {
    std::vector<Wide> bounds(frontier.size(), kNever);
    Rounded rounded(before);
    for (std::size_t i = frontier.size(); i-- > 0;) {
      const std::int64_t left = budget_ - frontier[i].cost;
      if (left < rounded.cost) continue;  // only the dearest, before any step
      rounded.spend(left);
      bounds[i] = frontier[i].distortion + rounded.distortion;
      best_ = static_cast<std::int64_t>(std::min<Wide>(best_, bounds[i]));
      if (rounded.step != rounded.end) bounds[i] -= Wide{rounded.step->distortion} * (left - rounded.cost) / rounded.step->cost;
    }
    Wide highest = ceiling();
    if (frontier.size() > width_) {
      auto sorted = bounds;
      std::ranges::nth_element(sorted, sorted.begin() + static_cast<std::ptrdiff_t>(width_));
      complete_ &= sorted[width_] > highest;
      highest = std::min(highest, sorted[width_]);
    }
    std::size_t kept = 0;
    for (std::size_t i = 0; i < frontier.size(); ++i)
      if (bounds[i] <= highest && kept < width_) frontier[kept++] = frontier[i];
    frontier.resize(kept);
    frontier.shrink_to_fit();
  }

  std::int64_t budget_;
  std::size_t width_;
  double quantum_;
  std::int64_t best_;  // total of the best choice known
  bool complete_ = true;
  WholeUnits units_;
  std::vector<Frontier> solutions_;  // [units with several options left, and one], choices from each of them on
};

}  // namespace

std::vector<int> allocate(std::span<const std::vector<AllocationOption>> units, std::int64_t budget) {
  check("allocate", units);
  const Problem problem = reduce(units, budget);
  if (units.empty()) return {};
  const auto frontier = allocation_frontier(units);
  double limit = (1 + kSums) * std::prev(std::ranges::upper_bound(frontier, budget, {}, &AllocationOption::cost))->distortion;
  for (std::size_t width = 256;; width *= 256) {  // narrow first: a good total is found soon, and then leaves little to search
    const Search search(problem, limit, width);
    if (!search.complete()) {
      limit = std::min(limit, search.total());
      continue;
    }
    auto choice = search.choice();
    double total = 0;
    for (std::size_t u = 0; u < units.size(); ++u) total += units[u][static_cast<std::size_t>(choice[u])].distortion;
    if (limit <= 4 * total) return choice;
    limit = (1 + kSums) * total;  // the quanta were too coarse for it
  }
}

std::vector<AllocationOption> allocation_frontier(std::span<const std::vector<AllocationOption>> units) {
  check("allocation_frontier", units);
  const auto relaxation = relax<AllocationOption>(units);
  AllocationOption point{0, 0};
  for (const auto& option : relaxation.start) point.cost += option.cost;
  for (const auto& step : relaxation.steps) point.cost += step.cost;
  for (const auto& options : units) point.distortion += std::ranges::min(options, {}, &AllocationOption::distortion).distortion;
  // From the last point to the first, so that the small distortions there are no differences of large ones.
  std::vector<AllocationOption> frontier = {point};
  for (auto step = relaxation.steps.rbegin(); step != relaxation.steps.rend(); ++step) {
    point.cost -= step->cost;
    point.distortion += step->distortion;
    frontier.push_back(point);
  }
  std::ranges::reverse(frontier);
  return frontier;
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
