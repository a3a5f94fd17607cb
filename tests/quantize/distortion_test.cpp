#include "veloxquant/quantize/distortion.h"

#include <gtest/gtest.h>

#include <limits>
#include <stdexcept>

#include "tests/quantize/samples.h"
#include "veloxquant/quantize/lloyd_max.h"

namespace veloxquant {
namespace {

constexpr int kDim = 64;

double at(const char* method, const std::vector<float>& vectors, std::size_t tokens, double rate, Side side = Side::kKeys) {
  return relative_distortions(quantizer_method(method), side, vectors, tokens, kDim, {rate}, 1)[0];
}

TEST(Distortion, IsTheErrorOfRestoring) {
  const auto vectors = testing::keys(200, kDim);
  for (const char* method : {"affine", "turboquant"}) {  // groups of one token: runs do not matter
    const auto quantizer =
        make_quantizer(quantizer_method(method).fit(vectors, kDim, {.side = Side::kValues, .width = 2, .seed = 1}));
    const double expected = testing::relative_error(vectors, testing::restored(*quantizer, vectors));
    EXPECT_NEAR(at(method, vectors, 50, 2, Side::kValues), expected, 1e-12);
    EXPECT_NEAR(restored_distortion(*quantizer, vectors, 200), expected, 1e-12);
  }
  EXPECT_NEAR(at("turboquant", testing::gaussian(2000, kDim), 100, 2), lloyd_max(2).distortion, 0.05 * lloyd_max(2).distortion);
}

// Each run begins a new group of KIVI's keys.
TEST(Distortion, RunsAreQuantisedOneByOne) {
  const auto vectors = testing::keys(80, kDim);
  const auto quantizer = make_quantizer(quantizer_method("kivi").fit({}, kDim, {.side = Side::kKeys, .width = 2}));
  std::vector<float> restored;
  for (std::size_t run = 0; run < 2; ++run) {
    const auto part = testing::restored(*quantizer, std::span(vectors).subspan(run * 40 * kDim, 40 * kDim));
    restored.insert(restored.end(), part.begin(), part.end());
  }
  EXPECT_NEAR(at("kivi", vectors, 40, 2), testing::relative_error(vectors, restored), 1e-12);
  EXPECT_NE(at("kivi", vectors, 40, 2), at("kivi", vectors, 80, 2));
}

// At 1.5 bits odd channels have two bits, even ones one bit; at 2.25 every fourth has three.
TEST(Distortion, BetweenWidthsChannelsAlternate) {
  const auto vectors = testing::keys(128, kDim);
  const struct {
    double rate;
    int narrow;
    std::size_t every;
  } rows[] = {{1.5, 1, 2}, {2.25, 2, 4}};
  for (const auto& row : rows) {
    const auto restored_at = [&](int width) {
      return testing::restored(*make_quantizer(quantizer_method("affine").fit({}, kDim, {.width = static_cast<double>(width)})),
                               vectors);
    };
    auto mixed = restored_at(row.narrow);
    const auto wide = restored_at(row.narrow + 1);
    for (std::size_t i = 0; i < mixed.size(); ++i)
      if (i % kDim % row.every == row.every - 1) mixed[i] = wide[i];
    EXPECT_NEAR(at("affine", vectors, 128, row.rate), testing::relative_error(vectors, mixed), 1e-12);
  }
}

TEST(Distortion, FallsWithTheRate) {
  const auto vectors = testing::gaussian(512, kDim);
  for (const char* method : {"affine", "kivi", "turboquant", "vecinfer"}) {
    double before = 1e9;
    for (const double rate : {1.0, 1.5, 2.0, 3.0, 4.0}) {
      const double distortion = at(method, vectors, 128, rate);
      EXPECT_LE(distortion, before) << method << " at " << rate;
      before = distortion;
    }
  }
}

TEST(Distortion, NothingToLose) {
  EXPECT_EQ(at("turboquant", std::vector<float>(40 * kDim, 0.0f), 40, 2), 0);
  EXPECT_EQ(at("affine", {}, 40, 2), 0);
}

TEST(Distortion, BadInput) {
  const auto vectors = testing::gaussian(40, kDim);
  for (const double rate : {0.5, 8.5, -1.0, std::numeric_limits<double>::quiet_NaN()})
    EXPECT_THROW(at("affine", vectors, 40, rate), std::invalid_argument);
  EXPECT_THROW(at("affine", vectors, 0, 2), std::invalid_argument);
  EXPECT_THROW(at("affine", vectors, 7, 2), std::invalid_argument);
}

}  // namespace
}  // namespace veloxquant
