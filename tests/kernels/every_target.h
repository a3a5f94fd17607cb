// What the tests of kernels share: every instruction set of this machine, one and two threads, random arrays.
#pragma once

#include <gtest/gtest.h>
#include <hwy/targets.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "veloxquant/core/parallel.h"
#include "veloxquant/core/random.h"
#include "veloxquant/kernels/ordered_product.h"

namespace veloxquant::testing {

/// Calls check() once for each instruction set that the kernels were compiled for and this processor has.
template <class Check>
void for_each_target(Check check) {
  for (const std::int64_t target : hwy::SupportedAndGeneratedTargets()) {
    SCOPED_TRACE(hwy::TargetName(target));
    hwy::SetSupportedTargetsForTest(target);
    check();
  }
  hwy::SetSupportedTargetsForTest(0);
}

/// compute() returns a std::vector<float>: the same bits on one, two and three threads?
template <class Compute>
void expect_same_on_any_threads(Compute compute) {
  const int before = num_threads();
  set_num_threads(1);
  const auto alone = compute();
  for (const int threads : {2, 3}) {
    set_num_threads(threads);
    EXPECT_EQ(compute(), alone) << threads << " threads";
  }
  set_num_threads(before);
}

/// The instruction set that is in use rounds a multiplication and an addition once.
inline bool rounds_once() {
  const float x = 1 + 0x1p-12f, minus = -(1 + 0x1p-11f);
  float y = 0;
  ordered_product(&x, 1, 1, 1, &x, 1, &minus, &y, 1);
  return y != 0;
}

inline std::vector<float> normal_values(std::size_t count, std::uint64_t seed, double deviation = 1.0) {
  Random random(seed);
  std::vector<float> values(count);
  for (auto& value : values) value = static_cast<float>(deviation * random.normal());
  return values;
}

/// |actual − expected| ≤ absolute + relative · |expected| everywhere.
inline void expect_near(const std::vector<float>& actual, const std::vector<float>& expected, double absolute,
                        double relative = 0.0) {
  ASSERT_EQ(actual.size(), expected.size());
  for (std::size_t i = 0; i < actual.size(); ++i)
    ASSERT_NEAR(actual[i], expected[i], absolute + relative * std::abs(static_cast<double>(expected[i]))) << "at " << i;
}

}  // namespace veloxquant::testing
