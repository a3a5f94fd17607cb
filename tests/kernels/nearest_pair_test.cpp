#include "veloxquant/kernels/nearest_pair.h"

#include <cmath>

#include "tests/kernels/every_target.h"

namespace veloxquant {
namespace {

using testing::normal_values;

float sum_of(const std::vector<float>& first, const std::vector<float>& second, const std::vector<float>& cross, CodePair pair) {
  return first[pair.first] + (second[pair.second] + cross[pair.first * first.size() + pair.second]);
}

TEST(NearestPair, EqualsReferenceAtOddSizes) {
  testing::for_each_target([] {
    for (const std::size_t count : {1, 2, 3, 7, 8, 15, 16, 17, 33, 64, 255, 256}) {
      for (const std::size_t beam : {std::size_t{1}, std::min<std::size_t>(3, count), std::min<std::size_t>(16, count), count}) {
        SCOPED_TRACE(::testing::Message() << count << " entries, beam " << beam);
        for (std::uint64_t seed = 0; seed < 5; ++seed) {
          const auto first = normal_values(count, seed), second = normal_values(count, seed + 10),
                     cross = normal_values(count * count, seed + 20);
          auto scratch = first;
          const auto pair = nearest_pair(scratch.data(), second.data(), cross.data(), count, beam);
          const auto expected = reference::nearest_pair(first.data(), second.data(), cross.data(), count, beam);
          ASSERT_LT(pair.first, count);
          ASSERT_LT(pair.second, count);
          EXPECT_FLOAT_EQ(sum_of(first, second, cross, pair), sum_of(first, second, cross, expected));
        }
      }
    }
  });
}

// Of equal sums the one that is found first.
TEST(NearestPair, TakesTheFirstOfEqualSums) {
  testing::for_each_target([] {
    for (const std::size_t count : {5, 40, 64, 256}) {
      std::vector<float> first(count, 1.0f);
      const std::vector<float> second(count, 2.0f), cross(count * count, 0.0f);
      const auto pair = nearest_pair(first.data(), second.data(), cross.data(), count, count);
      EXPECT_EQ(pair.first, 0);
      EXPECT_EQ(pair.second, 0);
    }
  });
}

// Many alike: those of the first table are taken in their order.
TEST(NearestPair, TakesEqualEntriesInTheirOrder) {
  testing::for_each_target([] {
    for (const std::size_t count : {33, 64, 256})
      for (std::uint64_t seed = 0; seed < 20; ++seed) {
        auto first = normal_values(count, seed), second = normal_values(count, seed + 30),
             cross = normal_values(count * count, seed + 60);
        for (auto* values : {&first, &second, &cross})
          for (float& value : *values) value = std::nearbyint(value);
        auto scratch = first;
        const auto pair = nearest_pair(scratch.data(), second.data(), cross.data(), count, 8);
        const auto expected = reference::nearest_pair(first.data(), second.data(), cross.data(), count, 8);
        EXPECT_EQ(pair.first, expected.first);
        EXPECT_EQ(pair.second, expected.second);
      }
  });
}

}  // namespace
}  // namespace veloxquant
