#include <bit>
#include <cmath>
#include <vector>

#include "veloxquant/kernels/hadamard.h"

namespace veloxquant::reference {

void hadamard(float* x, std::size_t rows, std::size_t dim) {
  std::vector<double> row(dim);
  for (std::size_t r = 0; r < rows; ++r, x += dim) {
    for (std::size_t i = 0; i < dim; ++i) {
      row[i] = 0;
      for (std::size_t j = 0; j < dim; ++j) row[i] += (std::popcount(i & j) % 2 == 0 ? 1.0 : -1.0) * x[j];
    }
    for (std::size_t i = 0; i < dim; ++i) x[i] = static_cast<float>(row[i] / std::sqrt(static_cast<double>(dim)));
  }
}

}  // namespace veloxquant::reference
