// Walsh–Hadamard transform.
#pragma once

#include <cstddef>
#include <vector>

namespace veloxquant {

/// Whether there is a Walsh–Hadamard matrix of Sylvester's form of this size.
constexpr bool is_power_of_two(std::size_t n) {
  return n > 0 && (n & (n - 1)) == 0;
}

/// Multiplies rows of x [rows, dim] in place by the orthonormal matrix H[i, j] = (−1)^popcount(i & j) / √dim, which is its own
/// transpose and inverse: dim · log₂ dim additions a row.  dim is a power of two.
void hadamard(float* x, std::size_t rows, std::size_t dim);

/// That matrix, [dim, dim] row-major.  Throws std::invalid_argument unless dim is a power of two up to 65,536.
std::vector<float> walsh_hadamard_matrix(std::size_t dim);

namespace reference {
void hadamard(float* x, std::size_t rows, std::size_t dim);
}

}  // namespace veloxquant
