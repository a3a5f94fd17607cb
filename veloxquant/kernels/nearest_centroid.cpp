#include "veloxquant/kernels/nearest_centroid.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "hwy/aligned_allocator.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "veloxquant/kernels/nearest_centroid.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

// Centroids that are scored together: with three vectors of points twelve accumulators, a point's vectors and a centroid's value
// fill the sixteen registers of AVX2.
#ifndef VELOXQUANT_NEAREST_CENTROID_QUAD
#define VELOXQUANT_NEAREST_CENTROID_QUAD
namespace veloxquant {
constexpr std::size_t kQuad = 4;

// Centroids whose values of one dimension stand beside each other.
constexpr std::size_t kRun = 16;

struct CentroidsView {
  const float* runs;  // [⌈count / kRun⌉, dim, kRun]
  const float* half_norms;
  const float* shift;
  std::size_t count, dim;

  std::size_t num_runs() const { return (count + kRun - 1) / kRun; }
  std::size_t num_quads() const { return (count + kQuad - 1) / kQuad; }

  // Where the values of a centroid begin; the next one is kRun further.
  std::size_t begin_of(std::size_t index) const { return index / kRun * dim * kRun + index % kRun; }
};

// Aligned memory of the thread.
inline float* columns(std::size_t size) {
  thread_local hwy::AlignedFreeUniquePtr<float[]> memory;
  thread_local std::size_t held = 0;
  if (held < size) memory = hwy::AllocateAligned<float>(size), held = size;
  return memory.get();
}

}  // namespace veloxquant
#endif

HWY_BEFORE_NAMESPACE();
namespace veloxquant {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using F = hn::ScalableTag<float>;
using I = hn::RebindToSigned<F>;

// The lowest score of each point, and the first quad of centroids in which it occurs.
struct Winners {
  float* scores;
  std::int32_t* quads;
};

// Lanes hold points: x [dim, kVectors · lanes].  One comparison a quad, rather than a centroid, keeps the arithmetic mostly
// products; which of the four it was is found afterwards, once a point.  kDim = 0: any dim.
template <std::size_t kVectors, std::size_t kDim>
void best_quads(const float* HWY_RESTRICT x, const CentroidsView& centroids, const Winners& winners) {
  const F d;
  const I di;
  const std::size_t lanes = hn::Lanes(d), dim = kDim != 0 ? kDim : centroids.dim;
  auto best0 = hn::Set(d, std::numeric_limits<float>::infinity()), best1 = best0, best2 = best0;
  auto where0 = hn::Zero(di), where1 = where0, where2 = where0;
  for (std::size_t quad = 0; quad < centroids.num_quads(); ++quad) {
    const float* half_norms = centroids.half_norms + quad * kQuad;
    auto a0 = hn::Set(d, half_norms[0]), a1 = a0, a2 = a0, b0 = hn::Set(d, half_norms[1]), b1 = b0, b2 = b0;
    auto c0 = hn::Set(d, half_norms[2]), c1 = c0, c2 = c0, e0 = hn::Set(d, half_norms[3]), e1 = e0, e2 = e0;
    const float* HWY_RESTRICT centroid = centroids.runs + centroids.begin_of(quad * kQuad);
    for (std::size_t i = 0; i < dim; ++i, centroid += kRun) {
      const float* column = x + i * kVectors * lanes;
      const auto x0 = hn::Load(d, column), x1 = kVectors > 1 ? hn::Load(d, column + lanes) : x0;
      const auto x2 = kVectors > 2 ? hn::Load(d, column + 2 * lanes) : x0;
      const auto subtract = [&](float value, hn::Vec<F>& s0, hn::Vec<F>& s1, hn::Vec<F>& s2) {
        const auto broadcast = hn::Set(d, value);
        s0 = hn::NegMulAdd(broadcast, x0, s0);
        if (kVectors > 1) s1 = hn::NegMulAdd(broadcast, x1, s1);
        if (kVectors > 2) s2 = hn::NegMulAdd(broadcast, x2, s2);
      };
      subtract(centroid[0], a0, a1, a2);
      subtract(centroid[1], b0, b1, b2);
      subtract(centroid[2], c0, c1, c2);
      subtract(centroid[3], e0, e1, e2);
    }
    const auto index = hn::Set(di, static_cast<std::int32_t>(quad));
    const auto keep = [&](hn::Vec<F> lowest, hn::Vec<F>& best, hn::Vec<I>& where) {
      where = hn::IfThenElse(hn::RebindMask(di, hn::Lt(lowest, best)), index, where);
      best = hn::Min(lowest, best);
    };
    keep(hn::Min(hn::Min(a0, b0), hn::Min(c0, e0)), best0, where0);
    if (kVectors > 1) keep(hn::Min(hn::Min(a1, b1), hn::Min(c1, e1)), best1, where1);
    if (kVectors > 2) keep(hn::Min(hn::Min(a2, b2), hn::Min(c2, e2)), best2, where2);
  }
  const auto store = [&](std::size_t at, hn::Vec<F> best, hn::Vec<I> where) {
    hn::Store(best, d, winners.scores + at);
    hn::Store(where, di, winners.quads + at);
  };
  store(0, best0, where0);
  if (kVectors > 1) store(lanes, best1, where1);
  if (kVectors > 2) store(2 * lanes, best2, where2);
}

// Which of the quad's centroids has the score: the same operations in the same order give the same bits.
std::size_t index_in_quad(const float* x, std::size_t x_stride, const CentroidsView& centroids, std::size_t quad, float score) {
  const hn::CappedTag<float, kQuad> d;
  const std::size_t lanes = hn::Lanes(d);
  for (std::size_t first = 0; first < kQuad; first += lanes) {
    auto scores = hn::LoadU(d, centroids.half_norms + quad * kQuad + first);
    const float* centroid = centroids.runs + centroids.begin_of(quad * kQuad) + first;
    for (std::size_t i = 0; i < centroids.dim; ++i)
      scores = hn::NegMulAdd(hn::LoadU(d, centroid + i * kRun), hn::Set(d, x[i * x_stride]), scores);
    const std::intptr_t found = hn::FindFirstTrue(d, hn::Eq(scores, hn::Set(d, score)));
    if (found >= 0) return std::min(quad * kQuad + first + static_cast<std::size_t>(found), centroids.count - 1);
  }
  return quad * kQuad;  // only for scores that are not numbers
}

// Lanes hold centroids: one point x [dim].  The same operations on each score as best_quads.
template <std::size_t kDim>
std::size_t nearest_of_dim(const float* HWY_RESTRICT x, const CentroidsView& centroids) {
  const hn::CappedTag<float, kRun> d;
  const hn::RebindToSigned<decltype(d)> di;
  constexpr std::size_t kLanes = hn::MaxLanes(d), kVectors = kRun / kLanes;
  const std::size_t dim = kDim != 0 ? kDim : centroids.dim;
  const float* HWY_RESTRICT centroid = centroids.runs;
  hn::Vec<decltype(d)> best[kVectors];
  hn::Vec<decltype(di)> where[kVectors];
  for (std::size_t v = 0; v < kVectors; ++v) {
    best[v] = hn::Set(d, std::numeric_limits<float>::infinity());
    where[v] = hn::Zero(di);
  }
  for (std::size_t run = 0; run < centroids.num_runs(); ++run) {
    hn::Vec<decltype(d)> scores[kVectors];
    for (std::size_t v = 0; v < kVectors; ++v) scores[v] = hn::LoadU(d, centroids.half_norms + run * kRun + v * kLanes);
    for (std::size_t i = 0; i < dim; ++i, centroid += kRun) {
      const auto value = hn::Set(d, x[i]);
      for (std::size_t v = 0; v < kVectors; ++v) scores[v] = hn::NegMulAdd(hn::LoadU(d, centroid + v * kLanes), value, scores[v]);
    }
    const auto index = hn::Set(di, static_cast<std::int32_t>(run));
    for (std::size_t v = 0; v < kVectors; ++v) {
      where[v] = hn::IfThenElse(hn::RebindMask(di, hn::Lt(scores[v], best[v])), index, where[v]);
      best[v] = hn::Min(scores[v], best[v]);
    }
  }
  HWY_ALIGN float scores[kRun];
  HWY_ALIGN std::int32_t runs[kRun];
  for (std::size_t v = 0; v < kVectors; ++v) {
    hn::Store(best[v], d, scores + v * kLanes);
    hn::Store(where[v], di, runs + v * kLanes);
  }
  const float lowest = *std::min_element(scores, scores + kRun);
  std::size_t first = centroids.count - 1;
  for (std::size_t lane = 0; lane < kRun; ++lane)
    if (scores[lane] == lowest) first = std::min(first, static_cast<std::size_t>(runs[lane]) * kRun + lane);
  return first;
}

std::size_t nearest(const float* x, const CentroidsView& centroids) {
  switch (centroids.dim) {
    case 2:
      return nearest_of_dim<2>(x, centroids);
    case 4:
      return nearest_of_dim<4>(x, centroids);
    case 8:
      return nearest_of_dim<8>(x, centroids);
    default:
      return nearest_of_dim<0>(x, centroids);
  }
}

template <std::size_t kVectors>
void best_quads_of_dim(const float* x, const CentroidsView& centroids, const Winners& winners) {
  switch (centroids.dim) {
    case 2:
      return best_quads<kVectors, 2>(x, centroids, winners);
    case 4:
      return best_quads<kVectors, 4>(x, centroids, winners);
    case 8:
      return best_quads<kVectors, 8>(x, centroids, winners);
    default:
      return best_quads<kVectors, 0>(x, centroids, winners);
  }
}

// Of points x [dim, block] from the centroids that begin at `first`: |x|² + 2·score would cancel where they are close.
void squared_distances(const float* x, std::size_t block, std::size_t dim, const float* runs, const std::int32_t* first,
                       float* distances) {
  const F d;
  const I di;
  for (std::size_t r = 0; r < block; r += hn::Lanes(d)) {
    auto at = hn::Load(di, first + r);
    auto sum = hn::Zero(d);
    for (std::size_t i = 0; i < dim; ++i) {
      const auto difference = hn::Sub(hn::Load(d, x + i * block + r), hn::GatherIndex(d, runs, at));
      sum = hn::MulAdd(difference, difference, sum);
      at = hn::Add(at, hn::Set(di, static_cast<std::int32_t>(kRun)));
    }
    hn::Store(sum, d, distances + r);
  }
}

// Rows of dim floats `stride` apart, less the shift, as columns x [dim, block]; beyond `count` the last row again.
void to_columns(const float* rows, std::size_t stride, std::size_t count, std::size_t block, std::size_t dim, const float* shift,
                float* x) {
  std::size_t done = 0;
#if HWY_TARGET != HWY_SCALAR  // four rows by four channels at a time
  const hn::FixedTag<float, 4> d;
  for (; dim % 4 == 0 && done + 4 <= count; done += 4) {
    for (std::size_t i = 0; i < dim; i += 4) {
      const float* at = rows + done * stride + i;
      const auto offset = hn::LoadU(d, shift + i);
      const auto row0 = hn::Sub(hn::LoadU(d, at), offset), row1 = hn::Sub(hn::LoadU(d, at + stride), offset);
      const auto row2 = hn::Sub(hn::LoadU(d, at + 2 * stride), offset), row3 = hn::Sub(hn::LoadU(d, at + 3 * stride), offset);
      const auto low01 = hn::InterleaveLower(d, row0, row1), low23 = hn::InterleaveLower(d, row2, row3);
      const auto high01 = hn::InterleaveUpper(d, row0, row1), high23 = hn::InterleaveUpper(d, row2, row3);
      float* column = x + i * block + done;
      hn::StoreU(hn::ConcatLowerLower(d, low23, low01), d, column);
      hn::StoreU(hn::ConcatUpperUpper(d, low23, low01), d, column + block);
      hn::StoreU(hn::ConcatLowerLower(d, high23, high01), d, column + 2 * block);
      hn::StoreU(hn::ConcatUpperUpper(d, high23, high01), d, column + 3 * block);
    }
  }
#endif
  for (std::size_t r = done; r < block; ++r)
    for (std::size_t i = 0; i < dim; ++i) x[i * block + r] = rows[std::min(r, count - 1) * stride + i] - shift[i];
}

void nearest_rows(const CentroidsView& centroids, const float* points, std::size_t rows, std::size_t stride, std::uint16_t* codes,
                  std::size_t code_stride, float* distances) {
  constexpr std::size_t kMaxBlock = 3 * hn::MaxLanes(F());
  const std::size_t lanes = hn::Lanes(F()), dim = centroids.dim;
  float* x = columns(dim * kMaxBlock);
  HWY_ALIGN float scores[kMaxBlock] = {};
  HWY_ALIGN std::int32_t quads[kMaxBlock] = {};
  std::size_t begin = 0;
  // Fewer points than lanes one by one, unless distances are wanted, which is where there are many.
  while (begin < rows && (distances || rows - begin >= lanes)) {
    const std::size_t block = rows - begin > lanes ? 3 * lanes : lanes, count = std::min(block, rows - begin);
    to_columns(points + begin * stride, stride, count, block, dim, centroids.shift, x);
    if (block == lanes) {
      best_quads_of_dim<1>(x, centroids, {scores, quads});
    } else {
      best_quads_of_dim<3>(x, centroids, {scores, quads});
    }
    for (std::size_t r = 0; r < count; ++r) {
      const std::size_t code = index_in_quad(x + r, block, centroids, static_cast<std::size_t>(quads[r]), scores[r]);
      codes[(begin + r) * code_stride] = static_cast<std::uint16_t>(code);
      quads[r] = static_cast<std::int32_t>(centroids.begin_of(code));
    }
    if (distances) {
      squared_distances(x, block, dim, centroids.runs, quads, scores);
      std::copy_n(scores, count, distances + begin);
    }
    begin += count;
  }
  for (; begin < rows; ++begin) {
    for (std::size_t i = 0; i < dim; ++i) x[i] = points[begin * stride + i] - centroids.shift[i];
    codes[begin * code_stride] = static_cast<std::uint16_t>(nearest(x, centroids));
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace veloxquant
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace veloxquant {

HWY_EXPORT(nearest_rows);

namespace {

// The centre of the values `stride` apart, rounded to multiples of the smallest power of two that is not below their spread around
// it: zero for data around zero, and subtracting it from their like is exact.
float shift_of(const float* values, std::size_t count, std::size_t stride) {
  float low = values[0], high = values[0];
  for (std::size_t i = 1; i < count; ++i) {
    low = std::min(low, values[i * stride]);
    high = std::max(high, values[i * stride]);
  }
  const double centre = (static_cast<double>(low) + high) / 2, spread = std::max(high - centre, std::abs(centre) * 0x1p-22);
  if (spread == 0) return 0.0f;
  const double grid = std::exp2(std::ceil(std::log2(spread)));
  return static_cast<float>(std::nearbyint(centre / grid) * grid);
}

}  // namespace

NearestCentroid::NearestCentroid(std::span<const float> centroids, std::size_t count, std::size_t dim) : count_(count), dim_(dim) {
  for (std::size_t i = 0; i < dim; ++i) shift_.push_back(shift_of(centroids.data() + i, count, dim));
  const CentroidsView view{nullptr, nullptr, nullptr, count, dim};
  runs_.resize(view.num_runs() * dim * kRun);
  half_norms_.assign(view.num_runs() * kRun, std::numeric_limits<float>::infinity());
  for (std::size_t c = 0; c < count; ++c) {
    float* column = runs_.data() + view.begin_of(c);
    double norm = 0;
    for (std::size_t i = 0; i < dim; ++i) {
      const float value = centroids[c * dim + i] - shift_[i];
      column[i * kRun] = value;
      norm += static_cast<double>(value) * value;
    }
    half_norms_[c] = static_cast<float>(norm / 2);
  }
}

void NearestCentroid::operator()(const float* points, std::size_t rows, std::size_t stride, std::uint16_t* codes,
                                 std::size_t code_stride, float* distances) const {
  const CentroidsView centroids{runs_.data(), half_norms_.data(), shift_.data(), count_, dim_};
  HWY_DYNAMIC_DISPATCH(nearest_rows)(centroids, points, rows, stride, codes, code_stride, distances);
}

}  // namespace veloxquant
#endif
