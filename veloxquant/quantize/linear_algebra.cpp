#include "veloxquant/quantize/linear_algebra.h"

#include <algorithm>
#include <cmath>

#include "veloxquant/core/error.h"
#include "veloxquant/kernels/gemm.h"
#include "veloxquant/kernels/openblas.h"

namespace veloxquant {

// LAPACK stores by columns: a symmetric matrix is the same either way, other ones are transposed.

SymmetricEigen symmetric_eigen(SquareMatrix matrix, std::size_t n) {
  SymmetricEigen eigen{std::vector<double>(n), std::move(matrix)};
  const int size = static_cast<int>(n), work_size = std::max(1, 34 * size);
  std::vector<double> work(static_cast<std::size_t>(work_size));
  keep_blas_on_one_thread();
  if (openblas::dsyev(size, eigen.vectors.data(), eigen.values.data(), work.data(), work_size) != 0)
    throw_failure("linear algebra", "the eigenvalues of a {} by {} matrix do not converge", n, n);
  return eigen;
}

SquareMatrix symmetric_power(const SquareMatrix& matrix, std::size_t n, double exponent) {
  constexpr double kLeast = 1e-8;
  const auto eigen = symmetric_eigen(matrix, n);
  const double least = kLeast * std::max(eigen.values.back(), 1e-300);
  SquareMatrix result(n * n);
  for (std::size_t e = 0; e < n; ++e) {
    const double value = std::pow(std::max(eigen.values[e], least), exponent);
    const double* vector = eigen.vectors.data() + e * n;
    for (std::size_t i = 0; i < n; ++i)
      for (std::size_t j = 0; j < n; ++j) result[i * n + j] += value * vector[i] * vector[j];
  }
  return result;
}

SquareMatrix multiply(const SquareMatrix& a, const SquareMatrix& b, std::size_t n) {
  SquareMatrix result(n * n);
  for (std::size_t i = 0; i < n; ++i)
    for (std::size_t k = 0; k < n; ++k)
      for (std::size_t j = 0; j < n; ++j) result[i * n + j] += a[i * n + k] * b[k * n + j];
  return result;
}

SquareMatrix inverse(const SquareMatrix& matrix, std::size_t n) {
  SquareMatrix a = matrix, result(n * n);
  for (std::size_t i = 0; i < n; ++i) result[i * n + i] = 1;
  const int size = static_cast<int>(n);
  std::vector<int> pivots(n);
  keep_blas_on_one_thread();
  // The columns that LAPACK sees are our rows: it inverts the transpose into the transpose.
  if (openblas::dgesv(size, a.data(), pivots.data(), result.data()) != 0)
    throw_failure("linear algebra", "a {} by {} matrix has no inverse", n, n);
  return result;
}

}  // namespace veloxquant
