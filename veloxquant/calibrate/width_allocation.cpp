#include "veloxquant/calibrate/width_allocation.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <limits>
#include <map>
#include <tuple>

#include "veloxquant/plan/plan.h"

namespace veloxquant {
namespace {

std::vector<std::vector<std::size_t>> groups_of(const std::vector<MeasuredUnit>& units, Units kind) {
  std::map<std::tuple<int, Side, int>, std::vector<std::size_t>> groups;
  for (std::size_t i = 0; i < units.size(); ++i) {
    const auto& unit = units[i];
    groups[{kind == Units::kUniform ? 0 : unit.layer, kind == Units::kUniform || kind == Units::kLayer ? Side::kKeys : unit.side,
            kind == Units::kHead ? unit.head : 0}]
        .push_back(i);
  }
  std::vector<std::vector<std::size_t>> result;
  for (auto& [key, members] : groups) result.push_back(std::move(members));
  return result;
}

// Of the window and sinks of one side of a head.
std::size_t exact_bytes(const ModelConfig& config, int tokens) {
  return make_quantizer(exact_parameters(Side::kKeys, config.head_dim))->encoded_bytes(static_cast<std::size_t>(tokens));
}

}  // namespace

ByteRange possible_bytes(const ModelConfig& config, std::size_t layers, int context, int exact_tokens) {
  const auto codes = ladder_codes(config.head_dim);
  const auto units = 2 * layers * static_cast<std::size_t>(config.num_kv_heads);
  const auto bytes = [&](int some, int patches) {
    const auto coded = rotated_pq_bytes(config.head_dim, some, patches, static_cast<std::size_t>(context - exact_tokens));
    return static_cast<std::int64_t>(units * (exact_bytes(config, exact_tokens) + coded));
  };
  return {bytes(codes.front(), 0), bytes(codes.back(), *std::max_element(std::begin(kPatchCounts), std::end(kPatchCounts)))};
}

WidthAllocation::WidthAllocation(const ModelConfig& config, const std::vector<MeasuredUnit>& units, Units kind, int context,
                                 int exact_tokens)
    : groups_(groups_of(units, kind)), num_units_(units.size()) {
  exact_bytes_ = static_cast<std::int64_t>(exact_bytes(config, exact_tokens) * units.size());
  elements_ = static_cast<double>(context) * config.head_dim * static_cast<double>(units.size());
  const auto coded = static_cast<std::size_t>(context - exact_tokens);
  for (const auto& group : groups_) {
    int fewest = 0, most = std::numeric_limits<int>::max();
    for (const std::size_t u : group) {
      fewest = std::max(fewest, units[u].ladder.least_codes());
      most = std::min(most, units[u].ladder.most_codes());
    }
    options_.emplace_back();
    widths_.emplace_back();
    for (int codes = fewest; codes <= most; ++codes) {
      for (const int patches : kPatchCounts) {
        double cost = 0;
        for (const std::size_t u : group) cost += units[u].ladder.cost(codes, patches);
        const auto bytes = rotated_pq_bytes(config.head_dim, codes, patches, coded) * group.size();
        options_.back().push_back({static_cast<std::int64_t>(bytes), cost});
        widths_.back().push_back({codes, patches});
      }
    }
  }
}

double WidthAllocation::bits_of(std::int64_t bytes) const {
  return 8.0 * static_cast<double>(bytes) / elements_;
}

std::int64_t WidthAllocation::bytes_of(double bits) const {
  constexpr double kRounding = 1e-9;
  return static_cast<std::int64_t>(std::floor(bits * elements_ / 8 + kRounding));
}

std::vector<Width> WidthAllocation::solve(std::int64_t bytes) const {
  const auto chosen = allocate(options_, bytes - exact_bytes_);
  std::vector<Width> result(num_units_);
  for (std::size_t g = 0; g < groups_.size(); ++g)
    for (const std::size_t u : groups_[g]) result[u] = widths_[g][static_cast<std::size_t>(chosen[g])];
  return result;
}

std::vector<FrontierPoint> WidthAllocation::frontier() const {
  std::vector<FrontierPoint> points;
  for (const auto& [cost, distortion] : allocation_frontier(options_)) points.push_back({bits_of(cost + exact_bytes_), distortion});
  return points;
}

}  // namespace veloxquant
