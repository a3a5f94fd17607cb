#include "veloxquant/kernels/nearest_centroid.h"

#include <algorithm>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "veloxquant/kernels/nearest_centroid.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace veloxquant {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Points that share the loads of a vector of centroids.
constexpr std::size_t kPoints = 4;

using F = hn::ScalableTag<float>;
using I = hn::RebindToSigned<F>;

// The lane with the smallest score, and of equal ones the lowest index.
void reduce(hn::Vec<F> best, hn::Vec<I> index, float* score, std::uint16_t* code) {
  const F d;
  const I di;
  HWY_ALIGN float scores[hn::MaxLanes(d)];
  HWY_ALIGN std::int32_t indices[hn::MaxLanes(d)];
  hn::Store(best, d, scores);
  hn::Store(index, di, indices);
  std::size_t lane = 0;
  for (std::size_t i = 1; i < hn::Lanes(d); ++i)
    if (scores[i] < scores[lane] || (scores[i] == scores[lane] && indices[i] < indices[lane])) lane = i;
  *score = scores[lane];
  *code = static_cast<std::uint16_t>(indices[lane]);
}

template <std::size_t kCount>
void nearest_block(const float* points, std::size_t stride, std::size_t dim, const float* transposed, const float* half_norms,
                   std::size_t padded, std::uint16_t* codes, std::size_t code_stride, float* scores) {
  const F d;
  const I di;
  const std::size_t lanes = hn::Lanes(d);
  hn::Vec<F> best0 = hn::Set(d, std::numeric_limits<float>::infinity()), best1 = best0, best2 = best0, best3 = best0;
  hn::Vec<I> index0 = hn::Zero(di), index1 = index0, index2 = index0, index3 = index0;
  auto index = hn::Iota(di, 0);
  const auto step = hn::Set(di, static_cast<std::int32_t>(lanes));
  const float *p0 = points, *p1 = points + (kCount > 1 ? stride : 0), *p2 = points + (kCount > 2 ? 2 * stride : 0),
              *p3 = points + (kCount > 3 ? 3 * stride : 0);
  for (std::size_t c = 0; c < padded; c += lanes) {
    auto s0 = hn::LoadU(d, half_norms + c), s1 = s0, s2 = s0, s3 = s0;
    const float* column = transposed + c;
    for (std::size_t i = 0; i < dim; ++i, column += padded) {
      const auto centroid = hn::LoadU(d, column);
      s0 = hn::NegMulAdd(hn::Set(d, p0[i]), centroid, s0);
      if (kCount > 1) s1 = hn::NegMulAdd(hn::Set(d, p1[i]), centroid, s1);
      if (kCount > 2) s2 = hn::NegMulAdd(hn::Set(d, p2[i]), centroid, s2);
      if (kCount > 3) s3 = hn::NegMulAdd(hn::Set(d, p3[i]), centroid, s3);
    }
    const auto keep = [&](hn::Vec<F> score, hn::Vec<F>& best, hn::Vec<I>& best_index) {
      const auto nearer = hn::Lt(score, best);
      best = hn::Min(score, best);
      best_index = hn::IfThenElse(hn::RebindMask(di, nearer), index, best_index);
    };
    keep(s0, best0, index0);
    if (kCount > 1) keep(s1, best1, index1);
    if (kCount > 2) keep(s2, best2, index2);
    if (kCount > 3) keep(s3, best3, index3);
    index = hn::Add(index, step);
  }
  reduce(best0, index0, scores, codes);
  if (kCount > 1) reduce(best1, index1, scores + 1, codes + code_stride);
  if (kCount > 2) reduce(best2, index2, scores + 2, codes + 2 * code_stride);
  if (kCount > 3) reduce(best3, index3, scores + 3, codes + 3 * code_stride);
}

void nearest_rows(const float* points, std::size_t rows, std::size_t stride, std::size_t dim, const float* transposed,
                  const float* half_norms, std::size_t padded, std::uint16_t* codes, std::size_t code_stride, float* distances) {
  float scores[kPoints];
  for (std::size_t r = 0; r < rows; r += kPoints) {
    const std::size_t count = std::min(kPoints, rows - r);
    const float* block = points + r * stride;
    std::uint16_t* block_codes = codes + r * code_stride;
    if (count == kPoints) {
      nearest_block<kPoints>(block, stride, dim, transposed, half_norms, padded, block_codes, code_stride, scores);
    } else {
      for (std::size_t i = 0; i < count; ++i)
        nearest_block<1>(block + i * stride, stride, dim, transposed, half_norms, padded, block_codes + i * code_stride, code_stride, scores + i);
    }
    if (!distances) continue;
    for (std::size_t i = 0; i < count; ++i) {
      // From the centroid itself: |x|² + 2·score would cancel where they are close.
      float distance = 0;
      for (std::size_t j = 0; j < dim; ++j) {
        const float difference = block[i * stride + j] - transposed[j * padded + block_codes[i * code_stride]];
        distance += difference * difference;
      }
      distances[r + i] = distance;
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace veloxquant
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace veloxquant {

HWY_EXPORT(nearest_rows);

NearestCentroid::NearestCentroid(std::span<const float> centroids, std::size_t count, std::size_t dim) : dim_(dim) {
  constexpr std::size_t kWidestVector = 16;  // lanes of the widest target
  padded_ = (count + kWidestVector - 1) / kWidestVector * kWidestVector;
  transposed_.resize(dim * padded_);
  half_norms_.assign(padded_, std::numeric_limits<float>::infinity());
  for (std::size_t c = 0; c < count; ++c) {
    double norm = 0;
    for (std::size_t i = 0; i < dim; ++i) {
      const float value = centroids[c * dim + i];
      transposed_[i * padded_ + c] = value;
      norm += static_cast<double>(value) * value;
    }
    half_norms_[c] = static_cast<float>(norm / 2);
  }
}

void NearestCentroid::operator()(const float* points, std::size_t rows, std::size_t stride, std::uint16_t* codes, std::size_t code_stride,
                                 float* distances) const {
  HWY_DYNAMIC_DISPATCH(nearest_rows)
  (points, rows, stride, dim_, transposed_.data(), half_norms_.data(), padded_, codes, code_stride, distances);
}

}  // namespace veloxquant
#endif
