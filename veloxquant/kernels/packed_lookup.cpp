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

// One piece of all tokens.  kWidth: its width where that is known when this is compiled, 0 otherwise; kPair: of two tables.
template <std::size_t kWidth, bool kPair>
void sum_piece(const std::uint8_t* tile, std::size_t tokens, const LookupPiece& piece, float* out, std::size_t stride) {
  const hn::CappedTag<float, kEntryLanes> d;
  const std::size_t lanes = hn::Lanes(d), width = kWidth > 0 ? kWidth : piece.width, first_stride = piece.codes[0].stride,
                    second_stride = piece.codes[1].stride;
  const std::uint8_t *first = tile + piece.codes[0].offset, *second = tile + piece.codes[1].offset;
  const float *first_table = piece.tables[0], *second_table = piece.tables[1];
  for (std::size_t t = 0; t < tokens; ++t, first += first_stride, out += stride) {
    const float* a = first_table + *first * width;
    const float* b = second_table;
    if (kPair) {
      b += *second * width;
      second += second_stride;
    }
    for (std::size_t i = 0; i < width; i += lanes) {
      const auto entry = hn::LoadU(d, a + i);
      hn::StoreU(kPair ? hn::Add(entry, hn::LoadU(d, b + i)) : entry, d, out + i);
    }
  }
}

template <bool kPair>
void sum_piece_of_any_width(const std::uint8_t* tile, std::size_t tokens, const LookupPiece& piece, float* out,
                            std::size_t stride) {
  switch (piece.width) {
    case 4:
      return sum_piece<4, kPair>(tile, tokens, piece, out, stride);
    case 8:
      return sum_piece<8, kPair>(tile, tokens, piece, out, stride);
    case 16:
      return sum_piece<16, kPair>(tile, tokens, piece, out, stride);
    default:
      return sum_piece<0, kPair>(tile, tokens, piece, out, stride);
  }
}

void sum_entries(const std::uint8_t* tile, std::size_t tokens, std::span<const LookupPiece> pieces, float* rows,
                 std::size_t stride) {
  for (const auto& piece : pieces) {
    const auto sum = piece.tables[1] ? sum_piece_of_any_width<true> : sum_piece_of_any_width<false>;
    sum(tile, tokens, piece, rows + piece.column, stride);
  }
}

// kQueries rows at once, so that a key is loaded once for them.
template <std::size_t kQueries>
void score_some(const float* q, const float* k, std::size_t tokens, std::size_t k_stride, std::size_t dim, float scale,
                float* scores, std::size_t score_stride) {
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

// kVectors vectors of columns of kQueries sums stay in registers over the tokens, enough of them that additions do not wait for
// each other.
template <std::size_t kQueries, std::size_t kVectors>
HWY_INLINE void add_columns(const float* weights, std::size_t weight_stride, const float* v, std::size_t tokens,
                            std::size_t v_stride, std::size_t dim, float* sums) {
  const hn::ScalableTag<float> d;
  const std::size_t lanes = hn::Lanes(d);
  hn::Vec<decltype(d)> sum[kQueries][kVectors];
  for (std::size_t r = 0; r < kQueries; ++r)
    for (std::size_t i = 0; i < kVectors; ++i) sum[r][i] = hn::LoadU(d, sums + r * dim + i * lanes);
  for (std::size_t t = 0; t < tokens; ++t)
    for (std::size_t i = 0; i < kVectors; ++i) {
      const auto value = hn::LoadU(d, v + t * v_stride + i * lanes);
      for (std::size_t r = 0; r < kQueries; ++r)
        sum[r][i] = hn::MulAdd(hn::Set(d, weights[r * weight_stride + t]), value, sum[r][i]);
    }
  for (std::size_t r = 0; r < kQueries; ++r)
    for (std::size_t i = 0; i < kVectors; ++i) hn::StoreU(sum[r][i], d, sums + r * dim + i * lanes);
}

template <std::size_t kQueries>
void add_some(const float* weights, std::size_t weight_stride, const float* v, std::size_t tokens, std::size_t v_stride,
              std::size_t dim, float* sums) {
  constexpr std::size_t kVectors = kQueries == 4 ? 2 : 4;
  const std::size_t lanes = hn::Lanes(hn::ScalableTag<float>());
  std::size_t i = 0;
  for (; i + kVectors * lanes <= dim; i += kVectors * lanes)
    add_columns<kQueries, kVectors>(weights, weight_stride, v + i, tokens, v_stride, dim, sums + i);
  for (; i + lanes <= dim; i += lanes) add_columns<kQueries, 1>(weights, weight_stride, v + i, tokens, v_stride, dim, sums + i);
  for (; i < dim; ++i)
    for (std::size_t r = 0; r < kQueries; ++r)
      for (std::size_t t = 0; t < tokens; ++t) sums[r * dim + i] += weights[r * weight_stride + t] * v[t * v_stride + i];
}

void add_rows(const float* weights, std::size_t num_queries, std::size_t weight_stride, const float* v, std::size_t tokens,
              std::size_t v_stride, std::size_t dim, float* sums) {
  std::size_t r = 0;
  for (; r + 4 <= num_queries; r += 4)
    add_some<4>(weights + r * weight_stride, weight_stride, v, tokens, v_stride, dim, sums + r * dim);
  weights += r * weight_stride, sums += r * dim;
  switch (num_queries - r) {
    case 3:
      return add_some<3>(weights, weight_stride, v, tokens, v_stride, dim, sums);
    case 2:
      return add_some<2>(weights, weight_stride, v, tokens, v_stride, dim, sums);
    case 1:
      return add_some<1>(weights, weight_stride, v, tokens, v_stride, dim, sums);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace veloxquant
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace veloxquant {

HWY_EXPORT(sum_entries);
HWY_EXPORT(score_rows);
HWY_EXPORT(add_rows);

void sum_entries(const std::uint8_t* tile, std::size_t tokens, std::span<const LookupPiece> pieces, float* rows,
                 std::size_t stride) {
  HWY_DYNAMIC_DISPATCH(sum_entries)(tile, tokens, pieces, rows, stride);
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
