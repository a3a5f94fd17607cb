#include "veloxquant/kernels/nearest_centroid.h"

#include <cmath>
#include <limits>

#include "tests/kernels/every_target.h"

namespace veloxquant {
namespace {

using testing::normal_values;

struct Result {
  std::vector<std::uint16_t> codes;
  std::vector<float> distances;
};

Result nearest(const std::vector<float>& centroids, std::size_t count, std::size_t dim, const std::vector<float>& points,
               std::size_t stride) {
  const std::size_t rows = stride == 0 ? 0 : points.size() / stride;
  Result result{std::vector<std::uint16_t>(rows, 0xffff), std::vector<float>(rows, -1.0f)};
  NearestCentroid(centroids, count, dim)(points.data(), rows, stride, result.codes.data(), 1, result.distances.data());
  return result;
}

Result expected(const std::vector<float>& centroids, std::size_t count, std::size_t dim, const std::vector<float>& points,
                std::size_t stride) {
  const std::size_t rows = points.size() / stride;
  Result result{std::vector<std::uint16_t>(rows), std::vector<float>(rows)};
  reference::nearest_centroid(centroids, count, dim, points.data(), rows, stride, result.codes.data(), 1, result.distances.data());
  return result;
}

// Codes may differ from the reference only where two centroids are equally far but for rounding of |x|².
void expect_as_near(const Result& actual, const Result& reference, double tolerance) {
  ASSERT_EQ(actual.codes.size(), reference.codes.size());
  std::size_t different = 0;
  for (std::size_t i = 0; i < actual.codes.size(); ++i) {
    ASSERT_NEAR(actual.distances[i], reference.distances[i], tolerance) << "point " << i;
    different += actual.codes[i] != reference.codes[i];
  }
  EXPECT_LE(different, actual.codes.size() / 100);
}

TEST(NearestCentroid, EqualsReferenceAtOddSizes) {
  testing::for_each_target([] {
    for (const std::size_t dim : {1, 2, 3, 4, 5, 8, 16, 32, 33}) {
      for (const std::size_t count : {1, 2, 3, 4, 5, 16, 31, 256}) {
        for (const std::size_t rows : {1, 2, 7, 8, 9, 24, 25, 47, 200}) {
          SCOPED_TRACE(::testing::Message() << "dim " << dim << ", " << count << " centroids, " << rows << " rows");
          const std::size_t stride = dim + rows % 3;
          const auto centroids = normal_values(count * dim, 1), points = normal_values(rows * stride, 2);
          expect_as_near(nearest(centroids, count, dim, points, stride), expected(centroids, count, dim, points, stride),
                         1e-5 * static_cast<double>(dim));
        }
      }
    }
  });
}

// Small integers leave no rounding, and many ties.
TEST(NearestCentroid, TiesGoToTheLowestIndex) {
  testing::for_each_target([] {
    for (const std::size_t dim : {1, 2, 3, 4, 7}) {
      Random random(dim);
      const auto integers = [&](std::size_t size, std::uint64_t values) {
        std::vector<float> result(size);
        for (auto& value : result) value = static_cast<float>(random.below(values)) - 2.0f;
        return result;
      };
      const std::size_t count = 4096;
      const auto centroids = integers(count * dim, 4), points = integers(300 * dim, 8);
      const auto actual = nearest(centroids, count, dim, points, dim), reference = expected(centroids, count, dim, points, dim);
      EXPECT_EQ(actual.codes, reference.codes);
      EXPECT_EQ(actual.distances, reference.distances);
    }
  });
}

// Keys with a bias: ½|c|² is a million times what tells centroids apart.
TEST(NearestCentroid, FarFromTheOrigin) {
  testing::for_each_target([] {
    const std::size_t dim = 4, count = 64;
    auto centroids = normal_values(count * dim, 1), points = normal_values(500 * dim, 2);
    for (auto* values : {&centroids, &points})
      for (std::size_t i = 0; i < values->size(); ++i) (*values)[i] += i % dim == 1 ? -3000.0f : i % dim == 2 ? 700.0f : 0.0f;
    expect_as_near(nearest(centroids, count, dim, points, dim), expected(centroids, count, dim, points, dim), 1e-5);
  });
}

TEST(NearestCentroid, IndicesStayInRangeWhateverTheValues) {
  constexpr float kHuge = 3e38f, kNan = std::numeric_limits<float>::quiet_NaN(), kInfinity = std::numeric_limits<float>::infinity();
  testing::for_each_target([] {
    for (const std::size_t count : {1, 2, 3, 5}) {
      for (const float centroid : {0.0f, 1.0f, kHuge, -kHuge}) {
        for (const float point : {0.0f, kHuge, -kHuge, kNan, kInfinity, -kInfinity}) {
          const auto result = nearest(std::vector<float>(count * 2, centroid), count, 2, {point, 1.0f, 1.0f, point}, 2);
          for (const auto code : result.codes) EXPECT_LT(code, count);
        }
      }
    }
  });
}

TEST(NearestCentroid, StridesOfCodesAndNoDistances) {
  const auto centroids = normal_values(16 * 4, 1), points = normal_values(50 * 4, 2);
  const auto plain = nearest(centroids, 16, 4, points, 4);
  std::vector<std::uint16_t> codes(50 * 3, 0xffff);
  NearestCentroid(centroids, 16, 4)(points.data(), 50, 4, codes.data() + 1, 3, nullptr);
  for (std::size_t i = 0; i < codes.size(); ++i) EXPECT_EQ(codes[i], i % 3 == 1 ? plain.codes[i / 3] : 0xffff);
}

// A point's code must not depend on its neighbours, or codes would change with how rows are shared out.
TEST(NearestCentroid, PointsDoNotDependOnEachOther) {
  testing::for_each_target([] {
    const auto centroids = normal_values(256 * 4, 1), points = normal_values(100 * 4, 2);
    const auto together = nearest(centroids, 256, 4, points, 4);
    for (std::size_t i = 0; i < 100; ++i) {
      const auto alone = nearest(
          centroids, 256, 4,
          {points.begin() + static_cast<std::ptrdiff_t>(i * 4), points.begin() + static_cast<std::ptrdiff_t>(i * 4 + 4)}, 4);
      ASSERT_EQ(alone.codes[0], together.codes[i]);
      ASSERT_EQ(alone.distances[0], together.distances[i]);
    }
  });
}

}  // namespace
}  // namespace veloxquant
