#include "veloxquant/evaluate/statistics.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

namespace veloxquant {
namespace {

constexpr std::array kMeasures = {&Measures::perplexity, &Measures::perplexity_change, &Measures::kl_mean, &Measures::kl_median,
                                  &Measures::kl_p99,     &Measures::kl_p999,           &Measures::kl_max,  &Measures::top1};

constexpr std::array<std::pair<double, double Measures::*>, 4> kQuantiles = {
    {{0.5, &Measures::kl_median}, {0.99, &Measures::kl_p99}, {0.999, &Measures::kl_p999}, {1.0, &Measures::kl_max}}};

constexpr std::size_t kNone = static_cast<std::size_t>(-1);

struct Sums {
  double kl = 0, cross_entropy = 0;
  std::size_t positions = 0, agreements = 0, targets = 0;

  double perplexity() const { return std::exp(cross_entropy / static_cast<double>(targets)); }
};

Sums sums_of(std::span<const WindowScores> windows, std::size_t left_out) {
  Sums sums;
  for (std::size_t w = 0; w < windows.size(); ++w) {
    if (w == left_out) continue;
    for (const double kl : windows[w].kl) sums.kl += kl;
    sums.cross_entropy += windows[w].cross_entropy;
    sums.positions += windows[w].kl.size();
    sums.agreements += windows[w].agreements;
    sums.targets += windows[w].targets;
  }
  return sums;
}

struct Position {
  float kl;
  std::size_t window;
};

std::vector<Position> ascending(std::span<const WindowScores> windows) {
  std::vector<Position> positions;
  for (std::size_t w = 0; w < windows.size(); ++w)
    for (const float kl : windows[w].kl) positions.push_back({kl, w});
  std::sort(positions.begin(), positions.end(), [](const Position& a, const Position& b) { return a.kl < b.kl; });
  return positions;
}

// In one walk over the positions, `count` of which are not left out.
void set_quantiles(std::span<const Position> positions, std::size_t count, std::size_t left_out, Measures& measures) {
  auto next = kQuantiles.begin();
  std::size_t seen = 0;
  for (const auto& [kl, window] : positions) {
    if (window == left_out) continue;
    ++seen;
    for (; next != kQuantiles.end() && static_cast<double>(seen) >= std::ceil(next->first * static_cast<double>(count)); ++next)
      measures.*(next->second) = kl;
  }
}

Measures measures_of(std::span<const WindowScores> scores, std::span<const WindowScores> full, std::span<const Position> positions,
                     std::size_t left_out) {
  const Sums sums = sums_of(scores, left_out);
  const auto count = static_cast<double>(sums.positions);
  Measures measures;
  measures.perplexity = sums.perplexity();
  measures.perplexity_change = measures.perplexity - sums_of(full, left_out).perplexity();
  measures.kl_mean = sums.kl / count;
  measures.top1 = static_cast<double>(sums.agreements) / count;
  set_quantiles(positions, sums.positions, left_out, measures);
  return measures;
}

double jackknife(std::span<const Measures> without, double Measures::*measure) {
  const auto count = static_cast<double>(without.size());
  double mean = 0, squares = 0;
  for (const auto& some : without) mean += some.*measure / count;
  for (const auto& some : without) squares += (some.*measure - mean) * (some.*measure - mean);
  return std::sqrt((count - 1) / count * squares);
}

Measures less(const Measures& a, const Measures& b) {
  Measures difference;
  for (const auto measure : kMeasures) difference.*measure = a.*measure - b.*measure;
  return difference;
}

}  // namespace

WindowStatistics window_statistics(std::span<const WindowScores> scores, std::span<const WindowScores> full) {
  const auto positions = ascending(scores);
  WindowStatistics statistics{measures_of(scores, full, positions, kNone), {}};
  if (scores.size() == 1) return statistics;
  for (std::size_t w = 0; w < scores.size(); ++w) statistics.without.push_back(measures_of(scores, full, positions, w));
  return statistics;
}

std::optional<Measures> standard_error(const WindowStatistics& statistics) {
  if (statistics.without.empty()) return std::nullopt;
  Measures error;
  for (const auto measure : kMeasures) error.*measure = jackknife(statistics.without, measure);
  return error;
}

PairedDifference paired_difference(const WindowStatistics& a, const WindowStatistics& b) {
  WindowStatistics difference{less(a.all, b.all), {}};
  for (std::size_t w = 0; w < a.without.size(); ++w) difference.without.push_back(less(a.without[w], b.without[w]));
  return {difference.all, standard_error(difference)};
}

}  // namespace veloxquant
