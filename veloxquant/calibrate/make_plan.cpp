#include "veloxquant/calibrate/make_plan.h"

#include <algorithm>
#include <cmath>

#include <fmt/ranges.h>

#include "veloxquant/calibrate/observe.h"
#include "veloxquant/calibrate/sensitivity.h"
#include "veloxquant/core/error.h"
#include "veloxquant/core/warning.h"
#include "veloxquant/plan/allocation.h"
#include "veloxquant/plan/distortion_curve.h"
#include "veloxquant/quantize/distortion.h"

namespace veloxquant {
namespace {

constexpr double kRounding = 1e-9;

// What a method offers for one head dimension: widths, ascending, and the bits that each takes.
struct Ladder {
  std::vector<double> widths, rates;
};

Ladder ladder_of(const QuantizerMethod& method, int head_dim) {
  Ladder ladder{.widths = method.widths(head_dim), .rates = {}};
  if (ladder.widths.empty()) throw_invalid("calibrate", "{} cannot store vectors of head_dim {}", method.name, head_dim);
  for (const double width : ladder.widths) ladder.rates.push_back(method.rate(head_dim, width));
  return ladder;
}

void check_range(const Ladder& ladder, const PlanOptions& options, int head_dim) {
  if (options.bits >= ladder.rates.front() - kRounding && options.bits <= ladder.rates.back() + kRounding) return;
  throw_invalid("calibrate", "bits: {} with {} and head_dim {} needs {:.4g} to {:.4g} bits, got {}", options.method,
                options.units == Units::kLayer ? "a width per layer" : "one width", head_dim, ladder.rates.front(), ladder.rates.back(),
                options.bits);
}

double uniform_width(const Ladder& ladder, const PlanOptions& options) {
  std::size_t best = 0;
  while (best + 1 < ladder.rates.size() && ladder.rates[best + 1] <= options.bits + kRounding) ++best;
  if (ladder.rates[best] < options.bits - kRounding)
    warn(fmt::format("one width for all layers gives {:.4g} bits (possible: {:.4g}); units per layer come closer to {:.4g}",
                     ladder.rates[best], fmt::join(ladder.rates, ", "), options.bits));
  return ladder.widths[best];
}

}  // namespace
}  // namespace veloxquant
