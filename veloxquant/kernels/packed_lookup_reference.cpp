#include <algorithm>
#include <vector>

#include "veloxquant/kernels/packed_lookup.h"

namespace veloxquant::reference {

void sum_entries(const std::uint8_t* tile, std::size_t tokens, std::span<const LookupPiece> pieces, float* rows,
                 std::size_t stride) {
  for (std::size_t t = 0; t < tokens; ++t)
    for (const auto& piece : pieces)
      for (std::size_t i = 0; i < piece.width; ++i) {
        float sum = 0;
        for (std::size_t stage = 0; stage < 2 && piece.tables[stage]; ++stage) {
          const auto& [offset, code_stride] = piece.codes[stage];
          sum += piece.tables[stage][tile[offset + t * code_stride] * piece.width + i];
        }
        rows[t * stride + piece.column + i] = sum;
      }
}

void score_rows(const float* q, std::size_t num_queries, const float* k, std::size_t tokens, std::size_t k_stride, std::size_t dim,
                float scale, float* scores, std::size_t score_stride) {
  for (std::size_t r = 0; r < num_queries; ++r)
    for (std::size_t t = 0; t < tokens; ++t) {
      float sum = 0;
      for (std::size_t i = 0; i < dim; ++i) sum += q[r * dim + i] * k[t * k_stride + i];
      scores[r * score_stride + t] = scale * sum;
    }
}

void add_rows(const float* weights, std::size_t num_queries, std::size_t weight_stride, const float* v, std::size_t tokens,
              std::size_t v_stride, std::size_t dim, float* sums) {
  for (std::size_t r = 0; r < num_queries; ++r)
    for (std::size_t t = 0; t < tokens; ++t)
      for (std::size_t i = 0; i < dim; ++i) sums[r * dim + i] += weights[r * weight_stride + t] * v[t * v_stride + i];
}

}  // namespace veloxquant::reference
