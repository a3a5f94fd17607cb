#include "veloxquant/quantize/linear_algebra.h"

#include <gtest/gtest.h>

#include <cmath>
#include <stdexcept>

#include "veloxquant/core/random.h"

namespace veloxquant {
namespace {

SquareMatrix random_matrix(std::size_t n, std::uint64_t seed) {
  Random random(seed);
  SquareMatrix matrix(n * n);
  for (double& value : matrix) value = random.normal();
  return matrix;
}

SquareMatrix transposed(const SquareMatrix& matrix, std::size_t n) {
  SquareMatrix result(n * n);
  for (std::size_t i = 0; i < n; ++i)
    for (std::size_t j = 0; j < n; ++j) result[j * n + i] = matrix[i * n + j];
  return result;
}

void expect_equal(const SquareMatrix& a, const SquareMatrix& b, double tolerance) {
  ASSERT_EQ(a.size(), b.size());
  for (std::size_t i = 0; i < a.size(); ++i) ASSERT_NEAR(a[i], b[i], tolerance) << "at " << i;
}

SquareMatrix identity(std::size_t n) {
  SquareMatrix matrix(n * n);
  for (std::size_t i = 0; i < n; ++i) matrix[i * n + i] = 1;
  return matrix;
}

TEST(LinearAlgebra, EigenvectorsDiagonaliseAndAreOrthonormal) {
  for (const std::size_t n : {1, 2, 5, 64}) {
    const auto root = random_matrix(n, n), matrix = multiply(root, transposed(root, n), n);
    const auto eigen = symmetric_eigen(matrix, n);
    expect_equal(multiply(eigen.vectors, transposed(eigen.vectors, n), n), identity(n), 1e-10);
    const auto diagonal = multiply(multiply(eigen.vectors, matrix, n), transposed(eigen.vectors, n), n);
    for (std::size_t i = 0; i < n; ++i) {
      EXPECT_NEAR(diagonal[i * n + i], eigen.values[i], 1e-9 * eigen.values.back());
      EXPECT_GE(eigen.values[i], eigen.values[i > 0 ? i - 1 : 0]);
    }
  }
}

TEST(LinearAlgebra, PowersMultiply) {
  const std::size_t n = 12;
  const auto factor = random_matrix(n, 3), matrix = multiply(factor, transposed(factor, n), n);
  const auto root = symmetric_power(matrix, n, 0.5);
  expect_equal(multiply(root, root, n), matrix, 1e-9);
  expect_equal(multiply(symmetric_power(matrix, n, -0.5), root, n), identity(n), 1e-6);
}

TEST(LinearAlgebra, InverseOfAnyMatrix) {
  for (const std::size_t n : {1, 3, 40}) {
    const auto matrix = random_matrix(n, n + 7);
    expect_equal(multiply(inverse(matrix, n), matrix, n), identity(n), 1e-8);
  }
  EXPECT_THROW(inverse({1, 2, 2, 4}, 2), std::runtime_error);
}

}  // namespace
}  // namespace veloxquant
