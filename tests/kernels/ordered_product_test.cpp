#include "veloxquant/kernels/ordered_product.h"

#include <gtest/gtest.h>

#include "tests/kernels/every_target.h"

namespace veloxquant {
namespace {

using testing::for_each_target;
using testing::normal_values;

struct Product {
  std::size_t rows, in, out;
  bool has_start = true;
  std::size_t x_padding = 3, y_padding = 2;  // which nobody may write to

  std::vector<float> x = normal_values(rows * (in + x_padding), 1), m = normal_values(in * out, 2), start = normal_values(out, 3);

  template <class Multiply>
  std::vector<float> by(Multiply multiply) const {
    std::vector<float> y(rows * (out + y_padding), -7.0f);
    multiply(x.data(), rows, in, in + x_padding, m.data(), out, has_start ? start.data() : nullptr, y.data(), out + y_padding);
    return y;
  }
};

TEST(OrderedProduct, BitsAreThoseOfTheReferenceWhereStepsRoundOnce) {
  int targets = 0, once = 0;
  for_each_target([&] {
    ++targets;
    once += testing::rounds_once();
  });
  ASSERT_GT(targets, 0);
  for (const std::size_t rows : {1, 2, 3, 5, 6, 8, 13})
    for (const std::size_t in : {1, 4, 7, 64})
      for (const std::size_t out : {1, 3, 4, 8, 15, 16, 21, 47, 64, 130}) {
        SCOPED_TRACE(::testing::Message() << rows << " x " << in << " x " << out);
        for (const bool has_start : {true, false}) {
          const Product product{rows, in, out, has_start};
          const auto expected = product.by(reference::ordered_product);
          for_each_target([&] {
            const auto got = product.by(ordered_product);
            // Sums of `in` products of standard normals.
            if (testing::rounds_once()) {
              EXPECT_EQ(got, expected);
            }
            testing::expect_near(got, expected, 4e-7 * static_cast<double>(in + 4));
          });
        }
      }
  // Codes are promised to be the same on all of these.
  for (const std::int64_t target : hwy::SupportedAndGeneratedTargets()) once -= target <= HWY_AVX2;
  EXPECT_EQ(once, 0);
}

TEST(OrderedProduct, BitsDoNotHangOnTheNumberOfRows) {
  const Product all{67, 80, 144};
  for_each_target([&] {
    const auto expected = all.by(ordered_product);
    for (const std::size_t step : {1, 2, 4, 7, 31}) {
      std::vector<float> y(expected.size(), -7.0f);
      for (std::size_t row = 0; row < all.rows; row += step)
        ordered_product(all.x.data() + row * (all.in + all.x_padding), std::min(step, all.rows - row), all.in,
                        all.in + all.x_padding, all.m.data(), all.out, all.start.data(), y.data() + row * (all.out + all.y_padding),
                        all.out + all.y_padding);
      EXPECT_EQ(y, expected) << step << " rows a call";
    }
  });
}

TEST(OrderedProduct, NothingToAdd) {
  const Product product{3, 0, 5};
  const auto y = product.by(ordered_product);
  EXPECT_EQ(y, product.by(reference::ordered_product));
  EXPECT_EQ(y[0], product.start[0]);
}

}  // namespace
}  // namespace veloxquant
