// Small dense matrices in double precision, row-major, by LAPACK.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

namespace veloxquant {

using SquareMatrix = std::vector<double>;  // [n, n]

/// Eigenvalues, ascending, and eigenvectors of a symmetric matrix.
struct SymmetricEigen {
  std::vector<double> values;  // [n]
  SquareMatrix vectors;        // row i is the unit eigenvector of values[i]
};

/// Throws std::runtime_error if LAPACK does not converge, which it does for finite matrices.
SymmetricEigen symmetric_eigen(SquareMatrix matrix, std::size_t n);

/// A symmetric matrix to a power, its eigenvalues taken to be at least 1e-8 of the largest.
SquareMatrix symmetric_power(const SquareMatrix& matrix, std::size_t n, double exponent);

/// a · b.
SquareMatrix multiply(const SquareMatrix& a, const SquareMatrix& b, std::size_t n);

/// Throws std::runtime_error for a matrix that is singular.
SquareMatrix inverse(const SquareMatrix& matrix, std::size_t n);

}  // namespace veloxquant
