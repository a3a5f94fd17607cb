#include "veloxquant/kernels/running_softmax.h"

#include <gtest/gtest.h>

#include <limits>

#include "tests/kernels/every_target.h"

namespace veloxquant {
namespace {

using testing::expect_near;
using testing::for_each_target;
using testing::normal_values;

TEST(RunningSoftmax, IsThatOfTheReferenceBlockByBlock) {
  for (const float cap : {0.0f, 3.0f}) {
    for (const std::size_t count : {1, 3, 8, 17, 64, 100}) {
      for_each_target([&] {
        float maximum = std::numeric_limits<float>::lowest(), sum = 0, expected_maximum = maximum, expected_sum = 0;
        for (int block = 0; block < 3; ++block) {
          auto scores = normal_values(count, static_cast<std::uint64_t>(block) + count, 4.0), expected = scores;
          const float shrink = running_softmax(scores.data(), count, cap, maximum, sum),
                      expected_shrink = reference::running_softmax(expected.data(), count, cap, expected_maximum, expected_sum);
          EXPECT_NEAR(shrink, expected_shrink, 1e-6);
          expect_near(scores, expected, 1e-7, 1e-5);
          EXPECT_NEAR(maximum, expected_maximum, 1e-5);
          EXPECT_NEAR(sum, expected_sum, 1e-5 * expected_sum);
        }
      });
    }
  }
}

}  // namespace
}  // namespace veloxquant
