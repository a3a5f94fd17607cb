#include "veloxquant/quantize/lloyd_max.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <mutex>
#include <numbers>

#include "veloxquant/core/error.h"

namespace veloxquant {
namespace {

constexpr int kMaxBits = 8;

double density(double x) {
  return std::isinf(x) ? 0.0 : std::exp(-x * x / 2) / std::sqrt(2 * std::numbers::pi);
}
double probability(double a, double b) {
  return (std::erfc(a / std::numbers::sqrt2) - std::erfc(b / std::numbers::sqrt2)) / 2;
}

// x > 0 with P(|X| < x) = p.
double quantile(double p) {
  double low = 0, high = 10;
  for (int i = 0; i < 60; ++i) {
    const double middle = (low + high) / 2;
    (2 * probability(0, middle) < p ? low : high) = middle;
  }
  return low;
}

// One Newton step towards levels that are the means of their cells; returns how far it moved them.  The fixed point's own iteration
// takes as many steps as there are pairs of levels.  A level depends on its neighbours alone, so the system is tridiagonal.
double newton_step(std::vector<double>& levels) {
  const std::size_t half = levels.size();
  std::vector<double> upper(half), residual(half);
  for (std::size_t i = 0; i < half; ++i) {
    const bool first = i == 0, last = i + 1 == half;
    const double a = first ? 0.0 : (levels[i - 1] + levels[i]) / 2, b = last ? INFINITY : (levels[i] + levels[i + 1]) / 2;
    const double mass = probability(a, b), mean = (density(a) - density(b)) / mass;
    const double by_a = first ? 0.0 : density(a) * (mean - a) / mass / 2, by_b = last ? 0.0 : density(b) * (b - mean) / mass / 2;
    // Elimination of the entry below the diagonal, −by_a.
    const double diagonal = 1 - by_a - by_b + (first ? 0.0 : by_a * upper[i - 1]);
    upper[i] = -by_b / diagonal;
    residual[i] = (levels[i] - mean + (first ? 0.0 : by_a * residual[i - 1])) / diagonal;
  }
  double moved = 0;
  for (std::size_t i = half; i-- > 0;) {
    if (i + 1 < half) residual[i] -= upper[i] * residual[i + 1];
    levels[i] -= residual[i];
    moved = std::max(moved, std::abs(residual[i]));
  }
  return moved;
}

// Only the positive half is computed: the levels are symmetric, and on this side erfc keeps its precision in the tail.
LloydMax compute(int bits) {
  const int half = 1 << (bits - 1);
  std::vector<double> levels;
  // Panter and Dite (1951): nearly best where the density of levels goes with the cube root of the data's.
  for (int i = 0; i < half; ++i) levels.push_back(std::sqrt(3.0) * quantile((i + 0.5) / half));
  for (int step = 0; step < 50 && newton_step(levels) > 1e-12; ++step) {
  }
  const auto edge = [&](int i) {
    if (i == 0) return 0.0;
    return i == half ? INFINITY : (levels[static_cast<std::size_t>(i - 1)] + levels[static_cast<std::size_t>(i)]) / 2;
  };
  LloydMax result;
  double captured = 0;
  for (int i = 0; i < half; ++i)
    captured += 2 * std::pow(levels[static_cast<std::size_t>(i)], 2) * probability(edge(i), edge(i + 1));
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
