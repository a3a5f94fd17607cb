#include "veloxquant/quantize/lloyd_max.h"

#include <array>
#include <cmath>
#include <mutex>
#include <numbers>

#include "veloxquant/core/error.h"

namespace veloxquant {
namespace {

constexpr int kMaxBits = 8;

double density(double x) { return std::isinf(x) ? 0.0 : std::exp(-x * x / 2) / std::sqrt(2 * std::numbers::pi); }
double probability(double a, double b) { return (std::erfc(a / std::numbers::sqrt2) - std::erfc(b / std::numbers::sqrt2)) / 2; }

// Only the positive half is iterated: the levels are symmetric, and on this side erfc keeps its precision in the tail.
LloydMax compute(int bits) {
  const int half = 1 << (bits - 1);
  std::vector<double> levels(static_cast<std::size_t>(half));
  for (int i = 0; i < half; ++i) levels[static_cast<std::size_t>(i)] = 3.0 * (i + 0.5) / half;
  const auto edge = [&](int i) { return i == 0 ? 0.0 : i == half ? INFINITY : (levels[static_cast<std::size_t>(i - 1)] + levels[static_cast<std::size_t>(i)]) / 2; };
  for (double moved = 1; moved > 1e-13;) {
    moved = 0;
    std::vector<double> next(levels);
    for (int i = 0; i < half; ++i) {
      const double a = edge(i), b = edge(i + 1);
      next[static_cast<std::size_t>(i)] = (density(a) - density(b)) / probability(a, b);
      moved = std::max(moved, std::abs(next[static_cast<std::size_t>(i)] - levels[static_cast<std::size_t>(i)]));
    }
    levels = next;
  }
  LloydMax result;
  double captured = 0;
  for (int i = 0; i < half; ++i) captured += 2 * levels[static_cast<std::size_t>(i)] * levels[static_cast<std::size_t>(i)] * probability(edge(i), edge(i + 1));
  result.distortion = 1 - captured;
  for (int i = half; i-- > 0;) result.levels.push_back(static_cast<float>(-levels[static_cast<std::size_t>(i)]));
  for (const double level : levels) result.levels.push_back(static_cast<float>(level));
  for (std::size_t i = 1; i < result.levels.size(); ++i) result.boundaries.push_back((result.levels[i - 1] + result.levels[i]) / 2);
  return result;
}

}  // namespace

const LloydMax& lloyd_max(int bits) {
  if (bits < 1 || bits > kMaxBits) throw_invalid("lloyd_max", "expected 1 to {} bits, got {}", kMaxBits, bits);
  static std::array<std::once_flag, kMaxBits> once;
  static std::array<LloydMax, kMaxBits> table;
  const auto index = static_cast<std::size_t>(bits - 1);
  std::call_once(once[index], [&] { table[index] = compute(bits); });
  return table[index];
}

}  // namespace veloxquant
