#include "veloxquant/quantize/turboquant.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/quantize/samples.h"

namespace veloxquant {
namespace {

TEST(TurboQuant, RotationIsOrthonormal) {
  for (const int dim : {2, 3, 64, 80, 128}) {
    SCOPED_TRACE(dim);
    const auto matrix = TurboQuantizer(dim, 2, 7).rotation_matrix();
    const auto size = static_cast<std::size_t>(dim);
    ASSERT_EQ(matrix.size(), size * size);
    for (std::size_t i = 0; i < size; ++i) {
      for (std::size_t j = 0; j <= i; ++j) {
        double dot = 0;
        for (std::size_t c = 0; c < size; ++c) dot += static_cast<double>(matrix[i * size + c]) * matrix[j * size + c];
        ASSERT_NEAR(dot, i == j ? 1 : 0, 1e-6);
      }
    }
    EXPECT_EQ(TurboQuantizer(dim, 2, 7).rotation_matrix(), matrix);
    if (dim > 3) {
      EXPECT_NE(TurboQuantizer(dim, 2, 8).rotation_matrix(), matrix);
    }
  }
}

// At many bits little but the rotation is left to go wrong.
TEST(TurboQuant, RestoresKeysAtEightBits) {
  for (const std::size_t dim : {2, 3, 64, 80, 128}) {
    const auto x = testing::keys(300, dim);
    EXPECT_LT(testing::relative_error(x, testing::restored(TurboQuantizer(static_cast<int>(dim), 8, 1), x)), dim < 16 ? 0.02 : 2e-4)
        << dim;
  }
}

// What the paper promises: the distortion of a Gaussian channel, whatever the data.
TEST(TurboQuant, DistortionOfLloydMax) {
  for (const std::size_t dim : {64, 80, 128}) {
    for (int bits = 1; bits <= 4; ++bits) {
      SCOPED_TRACE(::testing::Message() << "dim " << dim << ", " << bits << " bits");
      const TurboQuantizer quantizer(static_cast<int>(dim), bits, 3);
      const auto x = testing::gaussian(2000, dim);
      // Channels of a vector of fixed norm have a slightly lighter tail than a Gaussian: up to a few % below.
      const double gaussian = testing::relative_error(x, testing::restored(quantizer, x));
      EXPECT_GT(gaussian, 0.90 * lloyd_max(bits).distortion);
      EXPECT_LT(gaussian, 1.01 * lloyd_max(bits).distortion);
    }
  }
}

TEST(TurboQuant, VectorsOfAnyLength) {
  const TurboQuantizer quantizer(64, 4, 1);
  for (const float scale : {0.0f, 1e-30f, 1e-3f, 1e3f, 1e38f}) {
    auto x = testing::gaussian(1, 64);
    for (auto& value : x) value = std::clamp(value, -3.0f, 3.0f) * scale;
    const auto y = testing::restored(quantizer, x);
    for (const float value : y) EXPECT_TRUE(std::isfinite(value)) << scale;
    if (scale == 1e-3f || scale == 1e3f) {
      EXPECT_LT(testing::relative_error(x, y), 0.02);
    }
    if (scale <= 1e-30f) {
      EXPECT_EQ(y, std::vector<float>(64, 0.0f));
    }
  }
}

TEST(TurboQuant, Rate) {
  EXPECT_DOUBLE_EQ(TurboQuantizer(64, 2, 0).rate(), 2.25);
  EXPECT_DOUBLE_EQ(TurboQuantizer(128, 3, 0).rate(), 3.125);
  EXPECT_DOUBLE_EQ(TurboQuantizer(3, 1, 0).rate(), 8.0);  // two bytes of norm and one of three codes
}

}  // namespace
}  // namespace veloxquant
