#include "veloxquant/quantize/kmeans.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "tests/quantize/samples.h"
#include "veloxquant/core/parallel.h"
#include "veloxquant/core/random.h"
#include "veloxquant/core/warning.h"
#include "veloxquant/kernels/nearest_centroid.h"

namespace veloxquant {
namespace {

double mean_squared_error(const std::vector<float>& centroids, std::size_t dim, const std::vector<float>& points) {
  const std::size_t rows = points.size() / dim;
  std::vector<std::uint16_t> codes(rows);
  std::vector<float> distances(rows);
  reference::nearest_centroid(centroids, centroids.size() / dim, dim, points.data(), rows, dim, codes.data(), 1, distances.data());
  double sum = 0;
  for (const float distance : distances) sum += distance;
  return sum / static_cast<double>(rows);
}

// Lloyd's algorithm as textbooks have it: random points to start with, 25 rounds, empty cells stay.
double plain_lloyd(const std::vector<float>& points, std::size_t dim, std::size_t count, std::uint64_t seed) {
  const std::size_t rows = points.size() / dim;
  Random random(seed);
  std::vector<float> centroids;
  for (std::size_t c = 0; c < count; ++c) {
    const std::size_t row = random.below(rows);
    centroids.insert(centroids.end(), points.begin() + static_cast<std::ptrdiff_t>(row * dim),
                     points.begin() + static_cast<std::ptrdiff_t>((row + 1) * dim));
  }
  std::vector<std::uint16_t> codes(rows);
  for (int iteration = 0; iteration < 25; ++iteration) {
    reference::nearest_centroid(centroids, count, dim, points.data(), rows, dim, codes.data(), 1, nullptr);
    std::vector<double> sums(count * dim), sizes(count);
    for (std::size_t i = 0; i < points.size(); ++i) sums[codes[i / dim] * dim + i % dim] += points[i];
    for (const auto code : codes) ++sizes[code];
    for (std::size_t i = 0; i < sums.size(); ++i)
      if (sizes[i / dim] > 0) centroids[i] = static_cast<float>(sums[i] / sizes[i / dim]);
  }
  return mean_squared_error(centroids, dim, points);
}

TEST(KMeans, AsGoodAsPlainLloyd) {
  for (const std::size_t dim : {1, 2, 4, 8}) {
    for (const int count : {2, 16, 64}) {
      SCOPED_TRACE(::testing::Message() << "dim " << dim << ", " << count << " centroids");
      const auto points = testing::keys(2000, dim);
      const auto result = kmeans(points.data(), 2000, dim, dim, {.num_centroids = count, .seed = 5});
      EXPECT_EQ(result.used_centroids, count);
      EXPECT_NEAR(result.mean_squared_error, mean_squared_error(result.centroids, dim, points),
                  1e-5 * result.mean_squared_error + 1e-9);
      double plain = 0;
      for (std::uint64_t seed = 0; seed < 3; ++seed) plain += plain_lloyd(points, dim, static_cast<std::size_t>(count), seed) / 3;
      EXPECT_LE(result.mean_squared_error, 1.02 * plain);
    }
  }
}

// Clusters that lie apart are found whatever the seed: this is what k-means++ is for.
TEST(KMeans, FindsClusters) {
  for (std::uint64_t seed = 0; seed < 10; ++seed) {
    auto points = testing::gaussian(3200, 2);
    for (std::size_t i = 0; i < points.size(); ++i)
      points[i] = 0.01f * points[i] + static_cast<float>(i / 2 % 32 * (i % 2 == 0 ? 1 : 7) % 32);
    const auto result = kmeans(points.data(), 3200, 2, 2, {.num_centroids = 32, .seed = seed});
    // One pair of clusters sharing a centroid would cost 0.03 and more; k-means++ alone misses one now and then.
    EXPECT_LT(result.mean_squared_error, 0.3);
  }
}

TEST(KMeans, MoreIterationsNeverWorse) {
  const auto points = testing::gaussian(3000, 4);
  double before = std::numeric_limits<double>::max();
  for (const int iterations : {1, 2, 4, 8, 100}) {
    const auto result = kmeans(points.data(), 3000, 4, 4, {.num_centroids = 64, .max_iter = iterations, .seed = 2});
    EXPECT_LE(result.iterations, iterations);
    EXPECT_LE(result.mean_squared_error, before);
    before = result.mean_squared_error;
  }
}

TEST(KMeans, OneCentroidIsTheMean) {
  const auto points = testing::keys(777, 3);
  const auto result = kmeans(points.data(), 777, 3, 3, {.num_centroids = 1, .seed = 0});
  for (std::size_t j = 0; j < 3; ++j) {
    double mean = 0;
    for (std::size_t i = 0; i < 777; ++i) mean += points[i * 3 + j] / 777.0;
    EXPECT_NEAR(result.centroids[j], mean, 1e-5);
  }
}

TEST(KMeans, ManyCopiesOfFewPoints) {
  // 40 distinct points, very unequally often.
  std::vector<float> points;
  for (int i = 0; i < 40; ++i)
    for (int copy = 0; copy < (i == 0 ? 20000 : 1 + i % 3); ++copy)
      points.insert(points.end(), {static_cast<float>(i), static_cast<float>(i % 5)});
  const std::size_t rows = points.size() / 2;
  const auto exact = kmeans(points.data(), rows, 2, 2, {.num_centroids = 40, .seed = 1});
  EXPECT_EQ(exact.used_centroids, 40);
  EXPECT_EQ(exact.mean_squared_error, 0);
  const auto more = kmeans(points.data(), rows, 2, 2, {.num_centroids = 64, .seed = 1});
  EXPECT_EQ(more.used_centroids, 40);
  EXPECT_EQ(more.mean_squared_error, 0);
  std::set<std::pair<float, float>> distinct;
  for (std::size_t c = 0; c < 64; ++c) distinct.emplace(more.centroids[2 * c], more.centroids[2 * c + 1]);
  EXPECT_EQ(distinct.size(), 40u) << "an unused centroid is none of the points";
  const auto fewer = kmeans(points.data(), rows, 2, 2, {.num_centroids = 32, .max_iter = 1, .seed = 1});
  EXPECT_EQ(fewer.used_centroids, 32) << "no cell may be empty while there are more points than centroids";
}

TEST(ProductCodebook, SaysWhereCentroidsAreUnused) {
  Random random(3);
  std::vector<float> points(300 * 4, 2.5f);
  for (std::size_t i = 0; i < points.size(); ++i)
    if (i % 4 < 2) points[i] = static_cast<float>(random.normal());
  std::vector<std::string> warnings;
  set_warning_handler([&](std::string_view message) { warnings.emplace_back(message); });
  train_product_codebook(points, 4, 2, {.num_centroids = 64, .seed = 1});
  train_product_codebook(std::span(points).first(4 * 64), 4, 1, {.num_centroids = 64, .seed = 1});
  set_warning_handler({});
  EXPECT_EQ(warnings,
            (std::vector<std::string>{"codebook: sub-space 1 of 2 has 1 distinct points that count; 1 of 64 centroids are used"}));
}

TEST(KMeans, AllPointsEqual) {
  const std::vector<float> points(300 * 4, 2.5f);
  const auto result = kmeans(points.data(), 300, 4, 4, {.num_centroids = 256, .seed = 1});
  EXPECT_EQ(result.used_centroids, 1);
  EXPECT_EQ(result.mean_squared_error, 0);
  EXPECT_EQ(result.centroids, std::vector<float>(256 * 4, 2.5f));
}

TEST(KMeans, WeightsAreCopies) {
  const auto points = testing::gaussian(400, 2);
  std::vector<float> weights, copies;
  for (std::size_t i = 0; i < 400; ++i) {
    weights.push_back(static_cast<float>(i % 4));
    for (std::size_t copy = 0; copy < i % 4; ++copy) copies.insert(copies.end(), {points[2 * i], points[2 * i + 1]});
  }
  // Seeds differ between the two; with one centroid they do not matter.
  const auto one = kmeans(points.data(), 400, 2, 2, {.num_centroids = 1, .seed = 0}, weights);
  const auto one_copied = kmeans(copies.data(), copies.size() / 2, 2, 2, {.num_centroids = 1, .seed = 0});
  EXPECT_NEAR(one.centroids[0], one_copied.centroids[0], 1e-6);
  EXPECT_NEAR(one.mean_squared_error, one_copied.mean_squared_error, 1e-5);
  const auto many = kmeans(points.data(), 400, 2, 2, {.num_centroids = 16, .seed = 0}, weights);
  EXPECT_NEAR(many.mean_squared_error, mean_squared_error(many.centroids, 2, copies), 1e-5);
  EXPECT_EQ(many.used_centroids, 16);
  // As many centroids as points that weigh anything: all of those are exact.
  std::vector<float> few(400, 0.0f);
  for (std::size_t i = 0; i < 8; ++i) few[i * 50] = static_cast<float>(1 + i);
  const auto exact = kmeans(points.data(), 400, 2, 2, {.num_centroids = 8, .seed = 3}, few);
  EXPECT_EQ(exact.used_centroids, 8);
  EXPECT_EQ(exact.mean_squared_error, 0);
}

TEST(KMeans, SameOnAnyThreads) {
  const auto points = testing::gaussian(20000, 8);
  const int before = num_threads();
  std::vector<Tensor> codebooks;
  std::vector<std::vector<float>> centroids;
  for (const int threads : {1, 2, 3}) {
    set_num_threads(threads);
    codebooks.push_back(train_product_codebook(points, 8, 2, {.num_centroids = 32, .max_iter = 5, .seed = 9}));
    centroids.push_back(kmeans(points.data(), 20000, 8, 8, {.num_centroids = 32, .max_iter = 5, .seed = 9}).centroids);
  }
  set_num_threads(before);
  for (std::size_t i = 1; i < 3; ++i) {
    EXPECT_EQ(codebooks[i], codebooks[0]);
    EXPECT_EQ(centroids[i], centroids[0]);
  }
}

TEST(KMeans, ProductCodebookTrainsEachSubspace) {
  const auto vectors = testing::keys(600, 12);
  const auto codebook = train_product_codebook(vectors, 12, 3, {.num_centroids = 16, .seed = 4});
  EXPECT_EQ(codebook.shape, (std::vector<std::int64_t>{3, 16, 4}));
  for (std::size_t s = 0; s < 3; ++s) {
    std::vector<float> points;
    for (std::size_t i = 0; i < 600; ++i)
      points.insert(points.end(), vectors.begin() + static_cast<std::ptrdiff_t>(i * 12 + s * 4),
                    vectors.begin() + static_cast<std::ptrdiff_t>(i * 12 + s * 4 + 4));
    const std::vector<float> own(codebook.values.begin() + static_cast<std::ptrdiff_t>(s * 64),
                                 codebook.values.begin() + static_cast<std::ptrdiff_t>((s + 1) * 64));
    EXPECT_LE(mean_squared_error(own, 4, points), 1.03 * plain_lloyd(points, 4, 16, 0));
  }
}

// Cells that hold a point by exact distances.
std::size_t exactly_used(const std::vector<float>& centroids, std::size_t dim, const std::vector<float>& points) {
  std::set<std::size_t> used;
  for (std::size_t i = 0; i < points.size(); i += dim) {
    std::size_t nearest = 0;
    double least = std::numeric_limits<double>::infinity();
    for (std::size_t c = 0; c < centroids.size(); c += dim) {
      double distance = 0;
      for (std::size_t j = 0; j < dim; ++j) distance += std::pow(static_cast<double>(points[i + j]) - centroids[c + j], 2);
      if (distance < least) least = distance, nearest = c;
    }
    used.insert(nearest);
  }
  return used.size();
}

// No cell may be empty while there are more distinct points than centroids, also where float32 distances are nothing but rounding.
TEST(KMeans, NoEmptyCellsFarFromTheOrigin) {
  for (const auto& [offset, sigma] : {std::pair{30.0f, 0.01f}, std::pair{100.0f, 0.03f}, std::pair{1000.0f, 0.001f}}) {
    for (std::uint64_t seed = 0; seed < 3; ++seed) {
      SCOPED_TRACE(::testing::Message() << offset << " ± " << sigma << ", seed " << seed);
      auto points = testing::gaussian(4096, 4, seed);
      for (std::size_t i = 0; i < points.size(); ++i) points[i] = sigma * points[i] + (i / 4 % 2 == 0 ? offset : -offset);
      const auto result = kmeans(points.data(), 4096, 4, 4, {.num_centroids = 256, .max_iter = 10, .seed = seed});
      EXPECT_EQ(result.used_centroids, 256);
      EXPECT_EQ(exactly_used(result.centroids, 4, points), 256u);
    }
  }
}

TEST(KMeans, FewPointsOfVeryUnequalChannels) {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    auto points = testing::gaussian(4, 4, seed);
    for (std::size_t i = 0; i < 4; ++i) points[i * 4 + seed % 4] = 1000.0f + 0.001f * points[i * 4 + seed % 4];
    for (std::size_t i = 0; i < points.size(); ++i)
      if (i % 4 != seed % 4) points[i] *= 0.01f;
    const auto result = kmeans(points.data(), 4, 4, 4, {.num_centroids = 4, .seed = seed});
    EXPECT_EQ(result.used_centroids, 4) << seed;
    EXPECT_EQ(exactly_used(result.centroids, 4, points), 4u) << seed;
  }
}

// Cells that float32 cannot tell apart must not keep it busy for ever.
TEST(KMeans, EndsOnPointsThatHardlyDiffer) {
  std::vector<float> points;
  for (int i = 0; i < 3000; ++i) points.push_back((i % 2 == 0 ? 1e6f : -1e6f) + 0.0625f * static_cast<float>(i % 7));
  const auto result = kmeans(points.data(), 3000, 1, 1, {.num_centroids = 256, .max_iter = 20, .seed = 1});
  EXPECT_GE(result.used_centroids, 2);
  EXPECT_LT(result.iterations, 300);
  for (const float centroid : result.centroids) EXPECT_NEAR(std::abs(centroid), 1e6, 1);
}

template <class Call>
void expect_error(Call call, const std::string& text) {
  try {
    call();
    FAIL() << "no error that says " << text;
  } catch (const std::invalid_argument& error) {
    EXPECT_NE(std::string(error.what()).find(text), std::string::npos) << error.what();
  }
}

TEST(KMeans, BadInput) {
  auto points = testing::gaussian(10, 2);
  const auto run = [&](KMeansOptions options, std::vector<float> weights = {}) {
    kmeans(points.data(), 10, 2, 2, options, weights);
  };
  expect_error([&] { run({.num_centroids = 11}); }, "10 points are too few for 11 centroids");
  expect_error([&] { run({.num_centroids = 0}); }, "num_centroids: expected 1 to 65536, got 0");
  expect_error([&] { run({.num_centroids = 2, .max_iter = 0}); }, "max_iter: expected at least 1, got 0");
  expect_error([&] { run({.num_centroids = 2}, {1, 2}); }, "weights: expected 10, got 2");
  expect_error([&] { run({.num_centroids = 2}, std::vector<float>(10, -1.0f)); }, "got -1");
  expect_error([&] { run({.num_centroids = 2}, std::vector<float>(10, 0.0f)); }, "got none");
  expect_error([&] { train_product_codebook(points, 2, 3, {}); }, "num_subspaces: expected a divisor of the dimension 2, got 3");
  expect_error([&] { train_product_codebook(points, 3, 1, {}); }, "rows of 3 values, got 20 values");
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    points[13] = bad;
    expect_error([&] { run({.num_centroids = 2}); }, "in row 6");
  }
}

}  // namespace
}  // namespace veloxquant
