#include "veloxquant/kernels/gaussian_noise.h"

#include <cmath>

#include "tests/kernels/every_target.h"

namespace veloxquant {
namespace {

std::vector<float> noise(std::size_t count, std::uint64_t seed, float deviation = 1.0f) {
  std::vector<float> out(count);
  add_gaussian_noise(out.data(), count, deviation, seed, out.data());
  return out;
}

TEST(GaussianNoise, EqualsReferenceAtOddSizes) {
  testing::for_each_target([] {
    for (const std::size_t count : {0, 1, 7, 15, 16, 17, 63, 65, 40001}) {
      const auto x = testing::normal_values(count, 1);
      std::vector<float> actual(count), expected(count);
      add_gaussian_noise(x.data(), count, 0.5f, 77, actual.data());
      reference::add_gaussian_noise(x.data(), count, 0.5f, 77, expected.data());
      testing::expect_near(actual, expected, 5e-6);
    }
  });
}

// Moments, neighbours and seeds of 2^20 numbers, with tolerances of five standard errors.
TEST(GaussianNoise, IsNormalAndIndependent) {
  constexpr std::size_t kCount = 1 << 20;
  const auto a = noise(kCount, 1), b = noise(kCount, 2);
  double mean = 0, square = 0, fourth = 0, neighbours = 0, seeds = 0;
  for (std::size_t i = 0; i < kCount; ++i) {
    const double x = a[i];
    mean += x / kCount;
    square += x * x / kCount;
    fourth += x * x * x * x / kCount;
    neighbours += x * a[(i + 1) % kCount] / kCount;
    seeds += x * b[i] / kCount;
  }
  const double error = 5 / std::sqrt(static_cast<double>(kCount));
  EXPECT_NEAR(mean, 0, error);
  EXPECT_NEAR(square, 1, error * std::sqrt(2.0));
  EXPECT_NEAR(fourth, 3, error * std::sqrt(96.0));
  EXPECT_NEAR(neighbours, 0, error);
  EXPECT_NEAR(seeds, 0, error);
}

TEST(GaussianNoise, SameOnAnyThreads) {
  testing::expect_same_on_any_threads([] { return noise(100003, 5, 0.3f); });
}

}  // namespace
}  // namespace veloxquant
