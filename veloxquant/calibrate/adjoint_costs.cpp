#include "veloxquant/calibrate/adjoint_costs.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <numeric>

namespace veloxquant {
namespace {

// Rows and iterations that tell widths apart; what is chosen is trained in full.
constexpr std::size_t kLadderRows = 8192;
constexpr int kLadderIterations = 6;

constexpr double kLadderRates[] = {0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0};  // bits an element

// Of a rung's cost that the next one keeps at least where costs between them are interpolated: one rule for all costs, zero
// included, so that fewer patches never look cheaper.
constexpr double kLeastShare = 1e-12;

// A set of some tokens may hold no row out.
const UnitRows& costed_rows(const UnitStatistics& unit) {
  return unit.held_out.count() > 0 ? unit.held_out : unit.training;
}

// Of each held-out row, without patches.
struct RowCosts {
  std::vector<double> nats;    // ½ (gᵀe)²
  std::vector<double> errors;  // eᵀ G e
};

RowCosts row_costs(const UnitStatistics& unit, const QuantizerParameters& quantizer) {
  auto unpatched = quantizer;
  unpatched.numbers["patches"] = 0;
  const auto& rows = costed_rows(unit);
  std::vector<float> restored(rows.vectors.size());
  make_quantizer(unpatched)->restore(rows.vectors, restored);
  const std::size_t dim = static_cast<std::size_t>(quantizer.dim);
  RowCosts costs;
  std::vector<double> error(dim);
  for (std::size_t row = 0; row < rows.count(); ++row) {
    double inner = 0, square = 0;
    for (std::size_t i = 0; i < dim; ++i) {
      error[i] = static_cast<double>(restored[row * dim + i]) - rows.vectors[row * dim + i];
      inner += error[i] * rows.gradients[row * dim + i];
    }
    for (std::size_t i = 0; i < dim; ++i) {
      double sum = 0;
      for (std::size_t j = 0; j < dim; ++j) sum += unit.metric[i * dim + j] * error[j];
      square += error[i] * sum;
    }
    costs.nats.push_back(inner * inner / 2);
    costs.errors.push_back(square);
  }
  return costs;
}

// Row indices, those of largest error first.
std::vector<std::size_t> by_error(const RowCosts& costs) {
  std::vector<std::size_t> order(costs.errors.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return costs.errors[a] > costs.errors[b]; });
  return order;
}

// The mean over rows of which the worst are patched: what a patch of 4 bits leaves of an error is taken for nothing.
double cost_beyond(const RowCosts& costs, const std::vector<std::size_t>& order, int patches, const std::vector<int>& samples,
                   int samples_counted) {
  const std::size_t patched = order.size() * static_cast<std::size_t>(patches) / RotatedPqQuantizer::kBlockTokens;
  double sum = 0;
  std::size_t counted = 0;
  for (std::size_t i = 0; i < order.size(); ++i) {
    if (samples[order[i]] >= samples_counted) continue;
    ++counted;
    if (i >= patched) sum += costs.nats[order[i]];
  }
  return counted > 0 ? sum / static_cast<double>(counted) : 0.0;
}

}  // namespace

std::vector<int> ladder_codes(int head_dim) {
  std::vector<int> codes;
  for (const double rate : kLadderRates) {
    // At most half a code a dimension, as planes allow.
    const int count = std::clamp(static_cast<int>(rate * head_dim / 8), 1, std::max(1, head_dim / 2));
    if (codes.empty() || count > codes.back()) codes.push_back(count);
  }
  return codes;
}

double predicted_cost(const UnitStatistics& unit, const QuantizerParameters& quantizer, int patches, int samples_counted) {
  const auto costs = row_costs(unit, quantizer);
  return cost_beyond(costs, by_error(costs), patches, costed_rows(unit).samples, samples_counted);
}

namespace {

UnitRows ladder_rows(const UnitStatistics& unit) {
  const std::size_t count = unit.training.count(), kept = std::min(kLadderRows, count), dim = static_cast<std::size_t>(unit.dim);
  UnitRows some;
  for (std::size_t i = 0; i < kept; ++i) {
    const std::size_t row = count * i / kept;
    const auto take = [&](const std::vector<float>& from, std::vector<float>& to) {
      const auto begin = from.begin() + static_cast<std::ptrdiff_t>(row * dim);
      to.insert(to.end(), begin, begin + unit.dim);
    };
    take(unit.training.vectors, some.vectors);
    take(unit.training.gradients, some.gradients);
    some.samples.push_back(unit.training.samples[row]);
  }
  return some;
}

RotatedPqOptions quick_options(int codes, std::uint64_t seed) {
  return {.codes = codes, .stages = 1, .max_iter = kLadderIterations, .seed = seed};
}

}  // namespace

QuantizerParameters quick_fit(const UnitStatistics& unit, Rotation rotation, int codes, std::uint64_t seed) {
  const auto rows = ladder_rows(unit);
  return RotatedPqFitter(rows.vectors, unit.dim, {unit.metric, row_weights(rows, unit.metric)}, rotation)
      .fit(unit.side, quick_options(codes, seed));
}

CostLadder::CostLadder(const UnitStatistics& unit, Rotation rotation, std::uint64_t seed) {
  const auto rows = ladder_rows(unit);
  const RotatedPqFitter fitter(rows.vectors, unit.dim, {unit.metric, row_weights(rows, unit.metric)}, rotation);
  for (const int codes : ladder_codes(unit.dim)) {
    const auto costs = row_costs(unit, fitter.fit(unit.side, quick_options(codes, seed)));
    const auto order = by_error(costs);
    codes_.push_back(codes);
    costs_.emplace_back();
    for (std::size_t p = 0; p < std::size(kPatchCounts); ++p) {
      double cost = cost_beyond(costs, order, kPatchCounts[p], costed_rows(unit).samples, std::numeric_limits<int>::max());
      if (p > 0) cost = std::min(cost, costs_.back()[p - 1]);
      if (costs_.size() > 1) cost = std::min(cost, costs_[costs_.size() - 2][p]);
      costs_.back().push_back(cost);
    }
  }
}

double CostLadder::cost(int codes, int patches) const {
  const auto p =
      static_cast<std::size_t>(std::find(std::begin(kPatchCounts), std::end(kPatchCounts), patches) - std::begin(kPatchCounts));
  const auto above = static_cast<std::size_t>(std::lower_bound(codes_.begin(), codes_.end(), codes) - codes_.begin());
  if (codes_.at(above) == codes) return costs_[above].at(p);
  const double low = costs_.at(above - 1).at(p);
  if (!(low > 0)) return 0.0;
  const double high = std::max(costs_[above][p], kLeastShare * low);
  const double share = static_cast<double>(codes - codes_[above - 1]) / (codes_[above] - codes_[above - 1]);
  return std::exp((1 - share) * std::log(low) + share * std::log(high));
}

void CostLadder::scale(double factor) {
  for (auto& costs : costs_)
    for (double& cost : costs) cost *= factor;
}

}  // namespace veloxquant
