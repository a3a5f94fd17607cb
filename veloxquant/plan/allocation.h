// Which bits every unit gets, exactly.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "veloxquant/plan/distortion_curve.h"
#include "veloxquant/plan/layer_map.h"

namespace veloxquant {

/// One rung of a unit's ladder.
struct AllocationOption {
  std::int64_t cost;  // in any whole unit, 0 to 2^40
  double distortion;  // 0 to 1e300
};

/// Chooses one option per unit, of least total distortion among those whose total cost is at most `budget`: exact for any ladder,
/// convex or not.  Of choices whose totals agree to a relative 1e-12 the one with the larger cost in the first unit wins, then in
/// the second, and so on.  → the index of each unit's option.
///
/// The linear relaxation leaves a gap to a good choice; options outside the gap drop out, and dynamic programming over (cost,
/// distortion) states decides the rest (Dyer, Riha and Walker 1995; Pisinger 1995).  Time and memory grow with the number of
/// choices near the best, not with the budget: 2016 units of 40 options with budgets of 10^10 took 10 to 200 ms and at most 90 MiB
/// where units differ, and up to 1.4 s and 220 MiB where all are alike or many totals tie (one core;
/// bench/allocation_bench.cpp).
///
/// Throws std::invalid_argument for a unit without options, a cost or distortion out of range, a budget below the cheapest choice
/// (says it), and a problem with more than 2^25 states to keep (512 MiB), as when distortions fall exactly in line with large
/// costs.
std::vector<int> allocate(std::span<const std::vector<AllocationOption>> units, std::int64_t budget);

/// What every budget buys, nearly: the lower convex hull of the (cost, distortion) totals of all choices, from the cheapest choice
/// to the least distortion, cost rising and distortion falling.  Every point is a choice; allocate's total lies on the hull or
/// above.  Throws std::invalid_argument as allocate does for options.
std::vector<AllocationOption> allocation_frontier(std::span<const std::vector<AllocationOption>> units);

/// Whole bits per layer whose average is at most target_bits, of least total distortion by the curves; of equal ones the
/// lexicographically largest.  RateQuant (arXiv 2605.06675), with the exact solution in place of rounded water-filling.
/// Throws std::invalid_argument unless 1 ≤ min_bits ≤ max_bits ≤ 16 and target_bits lies in [min_bits, max_bits], and for no
/// layers.
LayerMap<int> allocate_bits_ratequant(const LayerMap<DistortionCurve>& curves, double target_bits = 2.0, int min_bits = 1,
                                      int max_bits = 4);

}  // namespace veloxquant
