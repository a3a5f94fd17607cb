#include "veloxquant/kernels/packed_lookup.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "veloxquant/kernels/packed_lookup.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace veloxquant {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Entries are short: wider vectors would mostly hold what the next piece overwrites.
constexpr std::size_t kEntryLanes = 8;

void sum_entries(const std::uint8_t* tile, std::size_t tokens, std::span<const LookupPiece> pieces, float* rows, std::size_t stride) {
  const hn::CappedTag<float, kEntryLanes> d;
  const std::size_t lanes = hn::Lanes(d);
  for (const auto& piece : pieces) {
    const std::size_t width = piece.width;
    const std::uint8_t *first = tile + piece.codes[0].offset, *second = tile + piece.codes[1].offset;
    float* out = rows + piece.column;
    if (!piece.tables[1]) {
      for (std::size_t t = 0; t < tokens; ++t, out += stride) {
        const float* entry = piece.tables[0] + first[t * piece.codes[0].stride] * width;
        for (std::size_t i = 0; i < width; i += lanes) hn::StoreU(hn::LoadU(d, entry + i), d, out + i);
      }
      continue;
    }
    for (std::size_t t = 0; t < tokens; ++t, out += stride) {
      const float* a = piece.tables[0] + first[t * piece.codes[0].stride] * width;
      const float* b = piece.tables[1] + second[t * piece.codes[1].stride] * width;
      for (std::size_t i = 0; i < width; i += lanes)
        hn::StoreU(hn::Add(hn::LoadU(d, a + i), hn::LoadU(d, b + i)), d, out + i);
    }
  }
}

void turn_pairs(float* rows, std::size_t tokens, std::size_t stride, std::size_t dim, const float* cosines, const float* sines) {
  const hn::ScalableTag<float> d;
  const std::size_t lanes = hn::Lanes(d), whole = lanes > 1 ? dim / lanes * lanes : 0;
  for (std::size_t t = 0; t < tokens; ++t, rows += stride, cosines += dim, sines += dim) {
    for (std::size_t i = 0; i < whole; i += lanes) {
      const auto x = hn::LoadU(d, rows + i);
      hn::StoreU(hn::MulAdd(x, hn::LoadU(d, cosines + i), hn::Mul(hn::Reverse2(d, x), hn::LoadU(d, sines + i))), d, rows + i);
    }
    for (std::size_t i = whole; i < dim; i += 2) {
      const float x = rows[i], y = rows[i + 1];
      rows[i] = x * cosines[i] + y * sines[i];
      rows[i + 1] = y * cosines[i + 1] + x * sines[i + 1];
    }
  }
}

// kQueries rows at once, so that a key is loaded once for them.
template <std::size_t kQueries>
void score_some(const float* q, const float* k, std::size_t tokens, std::size_t k_stride, std::size_t dim, float scale, float* scores,
                std::size_t score_stride) {
  const hn::ScalableTag<float> d;
  const std::size_t lanes = hn::Lanes(d), whole = dim / lanes * lanes;
  for (std::size_t t = 0; t < tokens; ++t, k += k_stride) {
    hn::Vec<decltype(d)> sums[kQueries];
    for (auto& sum : sums) sum = hn::Zero(d);
    for (std::size_t i = 0; i < whole; i += lanes) {
      const auto key = hn::LoadU(d, k + i);
      for (std::size_t r = 0; r < kQueries; ++r) sums[r] = hn::MulAdd(hn::LoadU(d, q + r * dim + i), key, sums[r]);
    }
    for (std::size_t r = 0; r < kQueries; ++r) {
      float score = hn::GetLane(hn::SumOfLanes(d, sums[r]));
      for (std::size_t i = whole; i < dim; ++i) score += q[r * dim + i] * k[i];
      scores[r * score_stride + t] = scale * score;
    }
  }
}

void score_rows(const float* q, std::size_t num_queries, const float* k, std::size_t tokens, std::size_t k_stride, std::size_t dim,
                float scale, float* scores, std::size_t score_stride) {
  std::size_t r = 0;
  for (; r + 4 <= num_queries; r += 4)
    score_some<4>(q + r * dim, k, tokens, k_stride, dim, scale, scores + r * score_stride, score_stride);
  for (; r + 2 <= num_queries; r += 2)
    score_some<2>(q + r * dim, k, tokens, k_stride, dim, scale, scores + r * score_stride, score_stride);
  if (r < num_queries) score_some<1>(q + r * dim, k, tokens, k_stride, dim, scale, scores + r * score_stride, score_stride);
}

// A vector of columns of kQueries sums stays in registers over the tokens.
template <std::size_t kQueries>
void add_some(const float* weights, std::size_t weight_stride, const float* v, std::size_t tokens, std::size_t v_stride, std::size_t dim,
              float* sums) {
  const hn::ScalableTag<float> d;
  const std::size_t lanes = hn::Lanes(d), whole = dim / lanes * lanes;
  for (std::size_t i = 0; i < whole; i += lanes) {
    hn::Vec<decltype(d)> sum[kQueries];
    for (std::size_t r = 0; r < kQueries; ++r) sum[r] = hn::LoadU(d, sums + r * dim + i);
    for (std::size_t t = 0; t < tokens; ++t) {
      const auto value = hn::LoadU(d, v + t * v_stride + i);
      for (std::size_t r = 0; r < kQueries; ++r) sum[r] = hn::MulAdd(hn::Set(d, weights[r * weight_stride + t]), value, sum[r]);
    }
    for (std::size_t r = 0; r < kQueries; ++r) hn::StoreU(sum[r], d, sums + r * dim + i);
  }
  for (std::size_t i = whole; i < dim; ++i)
    for (std::size_t r = 0; r < kQueries; ++r)
      for (std::size_t t = 0; t < tokens; ++t) sums[r * dim + i] += weights[r * weight_stride + t] * v[t * v_stride + i];
}

void add_rows(const float* weights, std::size_t num_queries, std::size_t weight_stride, const float* v, std::size_t tokens,
              std::size_t v_stride, std::size_t dim, float* sums) {
  std::size_t r = 0;
  for (; r + 4 <= num_queries; r += 4)
    add_some<4>(weights + r * weight_stride, weight_stride, v, tokens, v_stride, dim, sums + r * dim);
  for (; r + 2 <= num_queries; r += 2)
    add_some<2>(weights + r * weight_stride, weight_stride, v, tokens, v_stride, dim, sums + r * dim);
  if (r < num_queries) add_some<1>(weights + r * weight_stride, weight_stride, v, tokens, v_stride, dim, sums + r * dim);
}

}  // namespace HWY_NAMESPACE
}  // namespace veloxquant
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace veloxquant {

HWY_EXPORT(sum_entries);
HWY_EXPORT(turn_pairs);
HWY_EXPORT(score_rows);
HWY_EXPORT(add_rows);

void sum_entries(const std::uint8_t* tile, std::size_t tokens, std::span<const LookupPiece> pieces, float* rows, std::size_t stride) {
  HWY_DYNAMIC_DISPATCH(sum_entries)(tile, tokens, pieces, rows, stride);
}

void turn_pairs(float* rows, std::size_t tokens, std::size_t stride, std::size_t dim, const float* cosines, const float* sines) {
  HWY_DYNAMIC_DISPATCH(turn_pairs)(rows, tokens, stride, dim, cosines, sines);
}

void score_rows(const float* q, std::size_t num_queries, const float* k, std::size_t tokens, std::size_t k_stride, std::size_t dim,
                float scale, float* scores, std::size_t score_stride) {
  HWY_DYNAMIC_DISPATCH(score_rows)(q, num_queries, k, tokens, k_stride, dim, scale, scores, score_stride);
}

void add_rows(const float* weights, std::size_t num_queries, std::size_t weight_stride, const float* v, std::size_t tokens,
              std::size_t v_stride, std::size_t dim, float* sums) {
  HWY_DYNAMIC_DISPATCH(add_rows)(weights, num_queries, weight_stride, v, tokens, v_stride, dim, sums);
}

}  // namespace veloxquant
#endif
