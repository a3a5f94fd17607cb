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
  double distortion;  // finite, at least 0
};

/// Chooses one option per unit, of least total distortion among those whose total cost is at most `budget`: by dynamic programming,
/// so exact for any ladder, convex or not.  Of choices whose totals agree to a relative 1e-12 the one with the larger cost in the
/// first unit wins, then in the second, and so on.  → the index of each unit's option.
///
/// Time and memory grow with units · options · budget, after costs are divided by their greatest common divisor.
/// Throws std::invalid_argument for a unit without options, a cost or distortion out of range, a budget below the cheapest choice
/// (says it), and a problem that would take more than 2 GiB.
std::vector<int> allocate(std::span<const std::vector<AllocationOption>> units, std::int64_t budget);

/// Whole bits per layer whose average is at most target_bits, of least total distortion by the curves; of equal ones the
/// lexicographically largest.  RateQuant (arXiv 2605.06675), with the exact solution in place of rounded water-filling.
/// Throws std::invalid_argument unless 1 ≤ min_bits ≤ max_bits ≤ 16 and target_bits lies in [min_bits, max_bits], and for no
/// layers.
LayerMap<int> allocate_bits_ratequant(const LayerMap<DistortionCurve>& curves, double target_bits = 2.0, int min_bits = 1,
                                      int max_bits = 4);

}  // namespace veloxquant
