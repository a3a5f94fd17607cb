#include "veloxquant/kernels/hadamard.h"

#include <cmath>

#include "tests/kernels/every_target.h"

namespace veloxquant {
namespace {

using testing::normal_values;

TEST(Hadamard, EqualsReferenceOnEverySize) {
  testing::for_each_target([] {
    for (const std::size_t dim : {1, 2, 4, 8, 16, 32, 64, 128, 256, 1024}) {
      for (const std::size_t rows : {0, 1, 3}) {
        SCOPED_TRACE(dim);
        auto x = normal_values(rows * dim, dim), expected = x;
        hadamard(x.data(), rows, dim);
        reference::hadamard(expected.data(), rows, dim);
        testing::expect_near(x, expected, 2e-6);  // log₂ dim roundings of values around 1
      }
    }
  });
}

TEST(Hadamard, IsItsOwnInverseAndKeepsNorms) {
  const auto original = normal_values(5 * 128, 3);
  auto x = original;
  hadamard(x.data(), 5, 128);
  double before = 0, after = 0;
  for (std::size_t i = 0; i < 128; ++i) {
    before += static_cast<double>(original[i]) * original[i];
    after += static_cast<double>(x[i]) * x[i];
  }
  EXPECT_NEAR(after / before, 1.0, 1e-6);
  hadamard(x.data(), 5, 128);
  testing::expect_near(x, original, 2e-6);
}

TEST(Hadamard, SameBitsOnAnyThreads) {
  const auto original = normal_values(2000 * 64, 4);
  testing::expect_same_on_any_threads([&] {
    auto x = original;
    hadamard(x.data(), 2000, 64);
    return x;
  });
}

TEST(Hadamard, MatrixIsTheTransform) {
  const auto matrix = walsh_hadamard_matrix(16), x = normal_values(16, 5);
  EXPECT_EQ(walsh_hadamard_matrix(1), std::vector<float>{1.0f});
  EXPECT_EQ(walsh_hadamard_matrix(4),
            (std::vector<float>{.5f, .5f, .5f, .5f, .5f, -.5f, .5f, -.5f, .5f, .5f, -.5f, -.5f, .5f, -.5f, -.5f, .5f}));
  std::vector<float> product(16), transformed = x;
  for (std::size_t i = 0; i < 16; ++i)
    for (std::size_t j = 0; j < 16; ++j) product[j] += x[i] * matrix[i * 16 + j];
  hadamard(transformed.data(), 1, 16);
  testing::expect_near(transformed, product, 1e-6);
}

TEST(Hadamard, MatrixNeedsAPowerOfTwo) {
  for (const std::size_t dim : {0, 3, 80, 131072}) {
    try {
      walsh_hadamard_matrix(dim);
      FAIL() << dim;
    } catch (const std::invalid_argument& error) {
      EXPECT_NE(std::string(error.what()).find("power of two"), std::string::npos);
      EXPECT_NE(std::string(error.what()).find(std::to_string(dim)), std::string::npos);
    }
  }
}

}  // namespace
}  // namespace veloxquant
