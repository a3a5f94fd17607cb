#include "veloxquant/quantize/kmeans.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "veloxquant/core/error.h"
#include "veloxquant/core/parallel.h"
#include "veloxquant/core/random.h"
#include "veloxquant/kernels/nearest_centroid.h"

namespace veloxquant {
namespace {

constexpr std::size_t kBlockRows = 4096;       // rows whose sums are kept apart and added in order
constexpr std::size_t kSeedRowsPerCentroid = 32;  // of the subsample that seeding looks at
constexpr double kLeastProgress = 1e-4;

struct Points {
  const float* data;
  std::size_t rows, stride, dim;

  const float* row(std::size_t i) const { return data + i * stride; }
};

void check(const Points& points, const KMeansOptions& options) {
  if (options.num_centroids < 1 || options.num_centroids > 65536)
    throw_invalid("kmeans", "num_centroids: expected 1 to 65536, got {}", options.num_centroids);
  if (options.max_iter < 1) throw_invalid("kmeans", "max_iter: expected at least 1, got {}", options.max_iter);
  if (points.dim < 1) throw_invalid("kmeans", "expected points of at least 1 dimension, got 0");
  if (points.rows < static_cast<std::size_t>(options.num_centroids))
    throw_invalid("kmeans", "{} points are too few for {} centroids", points.rows, options.num_centroids);
  for (std::size_t i = 0; i < points.rows; ++i)
    for (std::size_t j = 0; j < points.dim; ++j)
      if (!std::isfinite(points.row(i)[j])) throw_invalid("kmeans", "expected finite points, got {} in row {}", points.row(i)[j], i);
}

float squared_distance(const float* a, const float* b, std::size_t dim) {
  float sum = 0;
  for (std::size_t i = 0; i < dim; ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
  return sum;
}

// Indices of distinct points, each drawn with probability in proportion to its squared distance from those drawn before; fewer than asked
// for if no other points are left in the subsample.
std::vector<std::size_t> seed_points(const Points& points, const KMeansOptions& options) {
  Random random(options.seed);
  const auto count = static_cast<std::size_t>(options.num_centroids);
  const std::size_t sample = std::min(points.rows, kSeedRowsPerCentroid * count);
  std::vector<std::size_t> rows(sample);
  for (std::size_t i = 0; i < sample; ++i) {
    const std::size_t begin = points.rows * i / sample, end = points.rows * (i + 1) / sample;  // one of each stretch
    rows[i] = begin + random.below(end - begin);
  }
  std::vector<float> nearest(sample, std::numeric_limits<float>::max());
  std::vector<std::size_t> seeds = {rows[random.below(sample)]};
  while (seeds.size() < count) {
    double total = 0;
    for (std::size_t i = 0; i < sample; ++i) {
      nearest[i] = std::min(nearest[i], squared_distance(points.row(rows[i]), points.row(seeds.back()), points.dim));
      total += nearest[i];
    }
    if (total <= 0) break;
    double left = random.uniform() * total;
    std::size_t chosen = sample;
    for (std::size_t i = 0; i < sample && left >= 0; ++i) {
      if (nearest[i] <= 0) continue;
      chosen = i;
      left -= nearest[i];
    }
    seeds.push_back(rows[chosen]);
  }
  return seeds;
}

class Lloyd {
 public:
  Lloyd(const Points& points, const KMeansOptions& options)
      : points_(points), count_(static_cast<std::size_t>(options.num_centroids)), codes_(points.rows), distances_(points.rows) {
    const auto seeds = seed_points(points, options);
    for (std::size_t c = 0; c < count_; ++c) {
      const float* seed = points.row(seeds[std::min(c, seeds.size() - 1)]);
      centroids_.insert(centroids_.end(), seed, seed + points.dim);
    }
  }

  KMeansResult run(int max_iter) {
    KMeansResult result;
    double before = std::numeric_limits<double>::max();
    for (result.iterations = 1;; ++result.iterations) {
      const double error = assign();
      const bool converged = error >= before * (1 - kLeastProgress) || error == 0;
      if (move_empty_cells()) {
        before = std::numeric_limits<double>::max();
        // Beyond max_iter only to fill cells; each round fills at least one for good or ends here.
        if (result.iterations < max_iter + static_cast<int>(count_)) continue;
      }
      if (converged || result.iterations >= max_iter) {
        result.mean_squared_error = error / static_cast<double>(points_.rows);
        break;
      }
      before = error;
      update();
    }
    result.used_centroids = static_cast<int>(count_ - static_cast<std::size_t>(std::count(sizes_.begin(), sizes_.end(), 0u)));
    for (std::size_t c = 0; c < count_; ++c)
      if (sizes_[c] == 0) std::copy_n(centroids_.begin() + static_cast<std::ptrdiff_t>(codes_[0] * points_.dim), points_.dim, centroids_.begin() + static_cast<std::ptrdiff_t>(c * points_.dim));
    result.centroids = std::move(centroids_);
    return result;
  }

 private:
  // Finds the nearest centroid of every point, and sums of the points of each cell; returns the total squared error.
  double assign() {
    const NearestCentroid nearest(centroids_, count_, points_.dim);
    const std::size_t blocks = (points_.rows + kBlockRows - 1) / kBlockRows, dim = points_.dim;
    std::vector<std::vector<double>> sums(blocks);
    std::vector<std::vector<unsigned>> sizes(blocks);
    std::vector<double> errors(blocks);
    parallel_for(points_.rows, kBlockRows, [&](std::size_t begin, std::size_t end) {
      nearest(points_.row(begin), end - begin, points_.stride, codes_.data() + begin, 1, distances_.data() + begin);
      auto& sum = sums[begin / kBlockRows];
      auto& size = sizes[begin / kBlockRows];
      sum.resize(count_ * dim);
      size.resize(count_);
      for (std::size_t i = begin; i < end; ++i) {
        ++size[codes_[i]];
        for (std::size_t j = 0; j < dim; ++j) sum[codes_[i] * dim + j] += points_.row(i)[j];
        errors[begin / kBlockRows] += distances_[i];
      }
    });
    sums_.assign(count_ * dim, 0.0);
    sizes_.assign(count_, 0u);
    double error = 0;
    for (std::size_t block = 0; block < blocks; ++block) {
      for (std::size_t i = 0; i < sums_.size(); ++i) sums_[i] += sums[block][i];
      for (std::size_t c = 0; c < count_; ++c) sizes_[c] += sizes[block][c];
      error += errors[block];
    }
    return error;
  }

  void update() {
    for (std::size_t c = 0; c < count_; ++c)
      for (std::size_t j = 0; j < points_.dim && sizes_[c] > 0; ++j)
        centroids_[c * points_.dim + j] = static_cast<float>(sums_[c * points_.dim + j] / sizes_[c]);
  }

  // Gives every empty cell one of the points farthest from their centroids, all of them distinct; false if there is nothing to move.
  bool move_empty_cells() {
    std::vector<std::size_t> empty;
    for (std::size_t c = 0; c < count_; ++c)
      if (sizes_[c] == 0) empty.push_back(c);
    if (empty.empty()) return false;
    std::vector<std::size_t> far;
    for (std::size_t i = 0; i < points_.rows; ++i)
      if (distances_[i] > 0) far.push_back(i);
    std::stable_sort(far.begin(), far.end(), [&](std::size_t a, std::size_t b) { return distances_[a] > distances_[b]; });
    std::vector<const float*> taken;
    const auto equal = [&](const float* a, const float* b) { return std::equal(a, a + points_.dim, b); };
    for (const std::size_t i : far) {
      if (taken.size() == empty.size()) break;
      if (std::any_of(taken.begin(), taken.end(), [&](const float* other) { return equal(points_.row(i), other); })) continue;
      std::copy_n(points_.row(i), points_.dim, centroids_.begin() + static_cast<std::ptrdiff_t>(empty[taken.size()] * points_.dim));
      taken.push_back(points_.row(i));
    }
    return !taken.empty();
  }

  Points points_;
  std::size_t count_;
  std::vector<float> centroids_;
  std::vector<std::uint16_t> codes_;
  std::vector<float> distances_;
  std::vector<double> sums_;
  std::vector<unsigned> sizes_;
};

}  // namespace

KMeansResult kmeans(const float* data, std::size_t rows, std::size_t stride, std::size_t dim, const KMeansOptions& options) {
  const Points points{data, rows, stride, dim};
  check(points, options);
  return Lloyd(points, options).run(options.max_iter);
}

Tensor train_product_codebook(std::span<const float> vectors, int dim, int num_subspaces, const KMeansOptions& options) {
  if (num_subspaces < 1 || dim % num_subspaces != 0)
    throw_invalid("codebook", "num_subspaces: expected a divisor of the dimension {}, got {}", dim, num_subspaces);
  const int subspace_dim = dim / num_subspaces;
  const std::size_t rows = vectors.size() / static_cast<std::size_t>(dim);
  Tensor codebook{{num_subspaces, options.num_centroids, subspace_dim}, {}};
  const std::size_t size = static_cast<std::size_t>(std::max(options.num_centroids, 0)) * static_cast<std::size_t>(subspace_dim);
  codebook.values.resize(static_cast<std::size_t>(num_subspaces) * size);
  parallel_for(static_cast<std::size_t>(num_subspaces), 1, [&](std::size_t begin, std::size_t) {
    KMeansOptions own = options;
    own.seed = Random(options.seed, begin).next();
    const auto result = kmeans(vectors.data() + begin * static_cast<std::size_t>(subspace_dim), rows, static_cast<std::size_t>(dim),
                               static_cast<std::size_t>(subspace_dim), own);
    std::copy(result.centroids.begin(), result.centroids.end(), codebook.values.begin() + static_cast<std::ptrdiff_t>(begin * size));
  });
  return codebook;
}

}  // namespace veloxquant
