#include "veloxquant/evaluate/statistics.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "veloxquant/core/random.h"

namespace veloxquant {
namespace {

// Skewed as divergences are.
std::vector<WindowScores> random_windows(std::size_t count, std::size_t positions, std::uint64_t seed) {
  Random random(seed);
  std::vector<WindowScores> windows(count);
  for (auto& window : windows) {
    const double hardness = 1 + random.uniform();
    for (std::size_t t = 0; t < positions; ++t) {
      window.kl.push_back(static_cast<float>(hardness * std::pow(random.uniform(), 6)));
      window.cross_entropy += hardness + random.uniform();
      window.agreements += random.uniform() < 0.8;
    }
    window.targets = positions - 1;
  }
  return windows;
}

std::vector<WindowScores> without(std::vector<WindowScores> windows, std::size_t left_out) {
  windows.erase(windows.begin() + static_cast<std::ptrdiff_t>(left_out));
  return windows;
}

double quantile(const std::vector<WindowScores>& windows, double q) {
  std::vector<float> all;
  for (const auto& window : windows) all.insert(all.end(), window.kl.begin(), window.kl.end());
  std::sort(all.begin(), all.end());
  return all[static_cast<std::size_t>(std::ceil(q * static_cast<double>(all.size()))) - 1];
}

void expect_equal(const Measures& a, const Measures& b) {
  EXPECT_DOUBLE_EQ(a.perplexity, b.perplexity);
  EXPECT_NEAR(a.perplexity_change, b.perplexity_change, 1e-12);
  EXPECT_DOUBLE_EQ(a.kl_mean, b.kl_mean);
  EXPECT_EQ(a.kl_median, b.kl_median);
  EXPECT_EQ(a.kl_p99, b.kl_p99);
  EXPECT_EQ(a.kl_p999, b.kl_p999);
  EXPECT_EQ(a.kl_max, b.kl_max);
  EXPECT_DOUBLE_EQ(a.top1, b.top1);
}

TEST(Statistics, AreThoseOfAllPositions) {
  for (const std::size_t positions : {2u, 7u, 1000u, 1001u}) {
    const auto windows = random_windows(3, positions, positions), full = random_windows(3, positions, 1);
    const Measures all = window_statistics(windows, full).all;
    double kl = 0, cross_entropy = 0, of_full = 0, agreements = 0;
    for (std::size_t w = 0; w < 3; ++w) {
      for (const float x : windows[w].kl) kl += x;
      cross_entropy += windows[w].cross_entropy, of_full += full[w].cross_entropy;
      agreements += static_cast<double>(windows[w].agreements);
    }
    const auto count = 3.0 * static_cast<double>(positions), targets = count - 3;
    EXPECT_NEAR(all.kl_mean, kl / count, 1e-12);
    EXPECT_NEAR(all.top1, agreements / count, 1e-12);
    EXPECT_NEAR(all.perplexity, std::exp(cross_entropy / targets), 1e-9);
    EXPECT_NEAR(all.perplexity_change, std::exp(cross_entropy / targets) - std::exp(of_full / targets), 1e-9);
    EXPECT_EQ(all.kl_median, quantile(windows, 0.5));
    EXPECT_EQ(all.kl_p99, quantile(windows, 0.99));
    EXPECT_EQ(all.kl_p999, quantile(windows, 0.999));
    EXPECT_EQ(all.kl_max, quantile(windows, 1));
  }
}

TEST(Statistics, WithoutAWindowAreThoseOfTheOthers) {
  const auto windows = random_windows(5, 300, 2), full = random_windows(5, 300, 3);
  const auto statistics = window_statistics(windows, full);
  ASSERT_EQ(statistics.without.size(), 5u);
  for (std::size_t w = 0; w < 5; ++w)
    expect_equal(statistics.without[w], window_statistics(without(windows, w), without(full, w)).all);
}

// Where theory has a formula of its own.
TEST(Statistics, ErrorsOfMeansAreTheKnownOnes) {
  const auto windows = random_windows(6, 200, 4);
  double mean = 0, squares = 0;
  std::vector<double> means;
  for (const auto& window : windows) {
    double sum = 0;
    for (const float x : window.kl) sum += x;
    means.push_back(sum / 200);
    mean += means.back() / 6;
  }
  for (const double x : means) squares += (x - mean) * (x - mean);
  const auto statistics = window_statistics(windows, windows);
  EXPECT_NEAR(standard_error(statistics)->kl_mean, std::sqrt(squares / 5 / 6), 1e-12);
  EXPECT_EQ(standard_error(statistics)->perplexity_change, 0);
}

// Of many texts drawn anew, quantiles and perplexity scatter by what one of them says.
TEST(Statistics, ErrorsAreHowMuchOtherTextsDiffer) {
  constexpr std::size_t kTexts = 300;
  std::vector<Measures> values, errors;
  for (std::size_t i = 0; i < kTexts; ++i) {
    const auto windows = random_windows(20, 200, 1000 + i);
    const auto statistics = window_statistics(windows, windows);
    values.push_back(statistics.all);
    errors.push_back(*standard_error(statistics));
  }
  for (const auto measure : {&Measures::kl_mean, &Measures::kl_median, &Measures::kl_p99, &Measures::perplexity, &Measures::top1}) {
    double mean = 0, variance = 0, said = 0;
    for (const auto& value : values) mean += value.*measure / kTexts;
    for (const auto& value : values) variance += (value.*measure - mean) * (value.*measure - mean) / (kTexts - 1);
    for (const auto& error : errors) said += error.*measure * (error.*measure) / kTexts;
    EXPECT_NEAR(std::sqrt(said / variance), 1, 0.2);
  }
}

TEST(Statistics, TheMaximumHangsOnItsWindow) {
  auto windows = random_windows(4, 50, 5);
  windows[2].kl[7] = 10;
  const double others = quantile(without(windows, 2), 1);
  EXPECT_NEAR(standard_error(window_statistics(windows, windows))->kl_max, 0.75 * (10 - others), 1e-6);
}

TEST(Statistics, OneWindowSaysNothingOfErrors) {
  const auto windows = random_windows(1, 50, 6);
  const auto statistics = window_statistics(windows, windows);
  EXPECT_FALSE(standard_error(statistics).has_value());
  EXPECT_FALSE(paired_difference(statistics, statistics).error.has_value());
}

// What both lose of a hard window cancels.
TEST(Statistics, PairedDifferences) {
  const auto a = random_windows(8, 100, 7);
  auto b = a;
  for (auto& window : b) {
    for (float& kl : window.kl) kl += 0.25f;
    window.cross_entropy += 1;
  }
  const auto of_a = window_statistics(a, a), of_b = window_statistics(b, a);
  const auto [value, error] = paired_difference(of_b, of_a);
  for (const auto measure : {&Measures::kl_mean, &Measures::kl_median, &Measures::kl_p999, &Measures::kl_max}) {
    EXPECT_NEAR(value.*measure, 0.25, 1e-6);
    EXPECT_LT((*error).*measure, 1e-6);
    EXPECT_GT((*standard_error(of_b)).*measure, 1e-3);
  }
  EXPECT_NEAR(value.perplexity, of_b.all.perplexity_change, 1e-12);
  EXPECT_NEAR(error->perplexity, standard_error(of_b)->perplexity_change, 1e-12);
  const auto back = paired_difference(of_a, of_b);
  EXPECT_DOUBLE_EQ(back.value.kl_mean, -value.kl_mean);
  EXPECT_DOUBLE_EQ(back.error->perplexity, error->perplexity);
}

}  // namespace
}  // namespace veloxquant
