#include "veloxquant/quantize/kmeans.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <set>

#include "veloxquant/core/error.h"
#include "veloxquant/core/parallel.h"
#include "veloxquant/core/random.h"
#include "veloxquant/core/warning.h"
#include "veloxquant/kernels/nearest_centroid.h"

namespace veloxquant {
namespace {

// Sums of rows are kept apart by blocks, and added in order.
constexpr std::size_t kMinBlockRows = 4096, kMaxBlocks = 32;

// Rows that seeding looks at.
constexpr std::size_t kSeedRows = 8192, kSeedRowsPerCentroid = 4;

constexpr double kLeastProgress = 1e-4;

// Iterations by exact distances, which take many times as long.
constexpr int kExactIterations = 5;

struct Points {
  const float* data;
  std::size_t rows, stride, dim;
  std::span<const float> weights;

  const float* row(std::size_t i) const { return data + i * stride; }
  float weight(std::size_t i) const { return weights.empty() ? 1.0f : weights[i]; }
};

void check_weights(const Points& points) {
  if (points.weights.empty()) return;
  if (points.weights.size() != points.rows)
    throw_invalid("kmeans", "weights: expected {}, got {}", points.rows, points.weights.size());
  bool any = false;
  for (const float weight : points.weights) {
    if (!std::isfinite(weight) || weight < 0)
      throw_invalid("kmeans", "weights: expected finite values of at least 0, got {}", weight);
    any |= weight > 0;
  }
  if (!any) throw_invalid("kmeans", "weights: expected some above 0, got none");
}

void check(const Points& points, const KMeansOptions& options) {
  if (options.num_centroids < 1 || options.num_centroids > 65536)
    throw_invalid("kmeans", "num_centroids: expected 1 to 65536, got {}", options.num_centroids);
  if (options.max_iter < 1) throw_invalid("kmeans", "max_iter: expected at least 1, got {}", options.max_iter);
  if (points.dim < 1) throw_invalid("kmeans", "expected points of at least 1 dimension, got 0");
  if (points.rows < static_cast<std::size_t>(options.num_centroids))
    throw_invalid("kmeans", "{} points are too few for {} centroids; expected one for each at least", points.rows,
                  options.num_centroids);
  for (std::size_t i = 0; i < points.rows; ++i)
    for (std::size_t j = 0; j < points.dim; ++j)
      if (!std::isfinite(points.row(i)[j]))
        throw_invalid("kmeans", "expected finite points, got {} in row {}", points.row(i)[j], i);
  check_weights(points);
}

// One row of each stretch of the data.
std::vector<std::size_t> seed_rows(const Points& points, std::size_t count, Random& random) {
  const std::size_t sample = std::min(points.rows, std::max(kSeedRows, kSeedRowsPerCentroid * count));
  std::vector<std::size_t> rows(sample);
  for (std::size_t i = 0; i < sample; ++i) {
    const std::size_t begin = points.rows * i / sample, end = points.rows * (i + 1) / sample;
    rows[i] = begin + random.below(end - begin);
  }
  return rows;
}

// Shares of probability of a list of indices, from which one is drawn after the other: summed by blocks, since one long sum of
// doubles would take longer than everything else in seeding.
class Shares {
 public:
  explicit Shares(std::size_t count) : shares_((count + kBlock - 1) / kBlock * kBlock), sums_(shares_.size() / kBlock) {}

  float& operator[](std::size_t i) { return shares_[i]; }

  /// Sums up what was set; to be called before the next two.
  void sum() {
    total_ = 0;
    for (std::size_t block = 0; block < sums_.size(); ++block) {
      std::array<float, kLanes> lanes{};
      for (std::size_t i = block * kBlock; i < (block + 1) * kBlock; i += kLanes)
        for (std::size_t lane = 0; lane < kLanes; ++lane) lanes[lane] += shares_[i + lane];
      sums_[block] = std::accumulate(lanes.begin(), lanes.end(), 0.0);
      total_ += sums_[block];
    }
  }

  double total() const { return total_; }

  /// An index drawn in proportion to its share; total() is above 0.
  std::size_t draw(Random& random) const {
    double left = random.uniform() * total_;
    std::size_t block = 0;
    while (block + 1 < sums_.size() && left >= sums_[block]) left -= sums_[block++];
    // Rounding may leave a rest behind the last share of a block.
    while (sums_[block] <= 0) --block;
    std::size_t chosen = 0;
    for (std::size_t i = block * kBlock; i < (block + 1) * kBlock && left >= 0; ++i) {
      if (shares_[i] <= 0) continue;
      chosen = i;
      left -= shares_[i];
    }
    return chosen;
  }

 private:
  static constexpr std::size_t kBlock = 128, kLanes = 16;

  std::vector<float> shares_;
  std::vector<double> sums_;
  double total_ = 0;
};

// Squared distances of some rows of points to one of them; channel by channel, which compilers turn into vector code.
class SquaredDistances {
 public:
  SquaredDistances(const Points& points, const std::vector<std::size_t>& rows)
      : rows_(rows.size()), columns_(rows.size() * points.dim) {
    for (std::size_t i = 0; i < rows_; ++i)
      for (std::size_t j = 0; j < points.dim; ++j) columns_[j * rows_ + i] = points.row(rows[i])[j];
  }

  void operator()(std::size_t to, std::vector<float>& distances) const {
    distances.assign(rows_, 0.0f);
    for (auto column = columns_.begin(); column != columns_.end(); column += static_cast<std::ptrdiff_t>(rows_)) {
      const float centre = column[static_cast<std::ptrdiff_t>(to)];
      std::transform(distances.begin(), distances.end(), column, distances.begin(),
                     [centre](float sum, float x) { return sum + (x - centre) * (x - centre); });
    }
  }

 private:
  std::size_t rows_;
  std::vector<float> columns_;  // [dim, rows]
};

// Indices of distinct points, each drawn with probability in proportion to its weighted squared distance from those drawn before;
// fewer than asked for if no other points are left in the subsample.
std::vector<std::size_t> seed_points(const Points& points, const KMeansOptions& options) {
  Random random(options.seed);
  const auto count = static_cast<std::size_t>(options.num_centroids);
  const auto rows = seed_rows(points, count, random);
  const SquaredDistances squared_distances(points, rows);
  std::vector<float> nearest(rows.size(), std::numeric_limits<float>::max()), distances;
  std::vector<float> weights(rows.size());
  Shares shares(rows.size());
  for (std::size_t i = 0; i < rows.size(); ++i) shares[i] = weights[i] = points.weight(rows[i]);
  shares.sum();
  std::vector<std::size_t> seeds;
  while (seeds.size() < count && shares.total() > 0) {
    const std::size_t chosen = shares.draw(random);
    seeds.push_back(rows[chosen]);
    squared_distances(chosen, distances);
    for (std::size_t i = 0; i < rows.size(); ++i) {
      nearest[i] = std::min(nearest[i], distances[i]);
      shares[i] = weights[i] * nearest[i];
    }
    shares.sum();
  }
  if (seeds.empty()) seeds.push_back(rows.front());  // the subsample has no weight
  return seeds;
}

class Lloyd {
 public:
  Lloyd(const Points& points, const KMeansOptions& options)
      : points_(points),
        count_(static_cast<std::size_t>(options.num_centroids)),
        block_rows_(std::max(kMinBlockRows, (points.rows + kMaxBlocks - 1) / kMaxBlocks)),
        codes_(points.rows),
        distances_(points.rows) {
    const auto seeds = seed_points(points, options);
    for (std::size_t c = 0; c < count_; ++c) {
      const float* seed = points.row(seeds[std::min(c, seeds.size() - 1)]);
      centroids_.insert(centroids_.end(), seed, seed + points.dim);
    }
  }

  KMeansResult run(int max_iter) {
    KMeansResult result;
    iterate(max_iter, result.iterations);
    if (!every_cell_holds_a_point()) {
      exact_ = true;
      iterate(std::min(max_iter, result.iterations + kExactIterations), result.iterations);
      // Without updates a cell that was filled keeps the point that it was filled with, so that this ends.
      while (empty_cells() > 0 && fill_empty_cells()) assign();
    }
    result.used_centroids = static_cast<int>(count_ - empty_cells());
    result.mean_squared_error = error_ / std::accumulate(weights_.begin(), weights_.end(), 0.0);
    for (std::size_t c = 0; c < count_; ++c)
      if (weights_[c] == 0) std::copy_n(centroid(codes_[0]), points_.dim, centroid(c));
    result.centroids = std::move(centroids_);
    return result;
  }

 private:
  struct Sums {
    std::vector<double> values, weights;  // [count, dim], [count]
    double error = 0;
  };

  void iterate(int max_iter, int& iterations) {
    double before = std::numeric_limits<double>::max();
    std::size_t fewest_empty = count_ + 1;
    for (++iterations;; ++iterations) {
      assign();
      const std::size_t empty = empty_cells();
      const bool filling = empty > 0 && empty < fewest_empty;  // beyond max_iter too, as long as it succeeds
      if (!filling && (iterations >= max_iter || error_ >= before * (1 - kLeastProgress))) break;
      fewest_empty = std::min(fewest_empty, empty);
      before = error_;
      if (iterations < max_iter) update();
      if (empty > 0 && !fill_empty_cells()) break;
    }
  }

  float* centroid(std::size_t c) { return centroids_.data() + c * points_.dim; }

  double squared_distance(std::size_t i, std::size_t c) const {
    const float *x = points_.row(i), *y = centroids_.data() + c * points_.dim;
    double sum = 0;
    for (std::size_t j = 0; j < points_.dim; ++j) {
      const double difference = static_cast<double>(x[j]) - y[j];
      sum += difference * difference;
    }
    return sum;
  }

  std::size_t exactly_nearest(std::size_t i) const {
    std::size_t nearest = 0;
    double least = std::numeric_limits<double>::infinity();
    for (std::size_t c = 0; c < count_; ++c)
      if (const double distance = squared_distance(i, c); distance < least) least = distance, nearest = c;
    return nearest;
  }

  // Whether exact distances leave every cell a point as well.  The kernel's are off by rounding relative to the size of the points,
  // not of the distance.  One point a cell, the one that the kernel takes for the nearest, shows it at no cost.
  bool every_cell_holds_a_point() const {
    std::vector<std::size_t> witnesses(count_, points_.rows);
    for (std::size_t i = 0; i < points_.rows; ++i) {
      std::size_t& witness = witnesses[codes_[i]];
      if (points_.weight(i) > 0 && (witness == points_.rows || distances_[i] < distances_[witness])) witness = i;
    }
    for (std::size_t c = 0; c < count_; ++c)
      if (witnesses[c] == points_.rows || exactly_nearest(witnesses[c]) != c) return false;
    return true;
  }

  std::size_t empty_cells() const { return static_cast<std::size_t>(std::count(weights_.begin(), weights_.end(), 0.0)); }

  Sums assign_rows(const NearestCentroid& nearest, std::size_t begin, std::size_t end) {
    const std::size_t dim = points_.dim;
    nearest(points_.row(begin), end - begin, points_.stride, codes_.data() + begin, 1, distances_.data() + begin);
    for (std::size_t i = begin; exact_ && i < end; ++i) {
      codes_[i] = static_cast<std::uint16_t>(exactly_nearest(i));
      distances_[i] = static_cast<float>(squared_distance(i, codes_[i]));
    }
    Sums sums{std::vector<double>(count_ * dim), std::vector<double>(count_)};
    for (std::size_t i = begin; i < end; ++i) {
      const double weight = points_.weight(i);
      double* values = sums.values.data() + codes_[i] * dim;
      for (std::size_t j = 0; j < dim; ++j) values[j] += weight * points_.row(i)[j];
      sums.weights[codes_[i]] += weight;
      sums.error += weight * distances_[i];
    }
    return sums;
  }

  // Finds the nearest centroid of every point, and the sums over the points of each cell.
  void assign() {
    const NearestCentroid nearest(centroids_, count_, points_.dim);
    std::vector<Sums> blocks((points_.rows + block_rows_ - 1) / block_rows_);
    parallel_for(points_.rows, block_rows_,
                 [&](std::size_t begin, std::size_t end) { blocks[begin / block_rows_] = assign_rows(nearest, begin, end); });
    sums_.assign(count_ * points_.dim, 0.0);
    weights_.assign(count_, 0.0);
    error_ = 0;
    for (const auto& block : blocks) {
      std::transform(sums_.begin(), sums_.end(), block.values.begin(), sums_.begin(), std::plus<>());
      std::transform(weights_.begin(), weights_.end(), block.weights.begin(), weights_.begin(), std::plus<>());
      error_ += block.error;
    }
  }

  void update() {
    for (std::size_t c = 0; c < count_; ++c)
      for (std::size_t j = 0; j < points_.dim && weights_[c] > 0; ++j)
        centroid(c)[j] = static_cast<float>(sums_[c * points_.dim + j] / weights_[c]);
  }

  // Gives every empty cell one of the points with most error, all of them distinct; false if there is nothing to move.
  bool fill_empty_cells() {
    std::vector<double> errors(points_.rows);
    std::vector<std::size_t> far;
    for (std::size_t i = 0; i < points_.rows; ++i) {
      errors[i] = points_.weight(i) * squared_distance(i, codes_[i]);
      if (errors[i] > 0) far.push_back(i);
    }
    std::stable_sort(far.begin(), far.end(), [&](std::size_t a, std::size_t b) { return errors[a] > errors[b]; });
    std::set<std::vector<float>> taken;
    auto next = far.begin();
    for (std::size_t c = 0; c < count_; ++c) {
      if (weights_[c] > 0) continue;
      while (next != far.end() && !taken.emplace(points_.row(*next), points_.row(*next) + points_.dim).second) ++next;
      if (next == far.end()) break;
      std::copy_n(points_.row(*next), points_.dim, centroid(c));
    }
    return !taken.empty();
  }

  Points points_;
  std::size_t count_, block_rows_;
  std::vector<float> centroids_;
  std::vector<std::uint16_t> codes_;
  std::vector<float> distances_;
  std::vector<double> sums_, weights_;  // of the points of each cell
  double error_ = 0;
  bool exact_ = false;  // nearest centroids by exact distances: many times slower
};

}  // namespace

KMeansResult kmeans(const float* data, std::size_t rows, std::size_t stride, std::size_t dim, const KMeansOptions& options,
                    std::span<const float> weights) {
  const Points given{data, rows, stride, dim, weights};
  check(given, options);
  // Every iteration reads all points: a dense copy of a sub-space fits the second-level cache where the vectors do not.
  std::vector<float> dense(rows * dim);
  for (std::size_t i = 0; i < rows; ++i) std::copy_n(given.row(i), dim, dense.data() + i * dim);
  return Lloyd({dense.data(), rows, dim, dim, weights}, options).run(options.max_iter);
}

Tensor train_product_codebook(std::span<const float> vectors, int dim, int num_subspaces, const KMeansOptions& options) {
  if (dim < 1 || vectors.size() % static_cast<std::size_t>(dim) != 0)
    throw_invalid("codebook", "expected rows of {} values, got {} values", dim, vectors.size());
  if (num_subspaces < 1 || dim % num_subspaces != 0)
    throw_invalid("codebook", "num_subspaces: expected a divisor of the dimension {}, got {}", dim, num_subspaces);
  const int subspace_dim = dim / num_subspaces;
  const std::size_t rows = vectors.size() / static_cast<std::size_t>(dim);
  Tensor codebook{{num_subspaces, options.num_centroids, subspace_dim}, {}};
  const std::size_t size = static_cast<std::size_t>(std::max(options.num_centroids, 0)) * static_cast<std::size_t>(subspace_dim);
  codebook.values.resize(static_cast<std::size_t>(num_subspaces) * size);
  std::vector<int> used(static_cast<std::size_t>(num_subspaces));
  parallel_for(static_cast<std::size_t>(num_subspaces), 1, [&](std::size_t begin, std::size_t) {
    KMeansOptions own = options;
    own.seed = Random(options.seed, begin).next();
    const auto result = kmeans(vectors.data() + begin * static_cast<std::size_t>(subspace_dim), rows, static_cast<std::size_t>(dim),
                               static_cast<std::size_t>(subspace_dim), own);
    std::copy(result.centroids.begin(), result.centroids.end(),
              codebook.values.begin() + static_cast<std::ptrdiff_t>(begin * size));
    used[begin] = result.used_centroids;
  });
  const auto fewest = std::min_element(used.begin(), used.end());
  if (*fewest < options.num_centroids)
    warn(fmt::format("codebook: sub-space {} of {} has {} distinct points that count; {} of {} centroids are used",
                     fewest - used.begin(), num_subspaces, *fewest, *fewest, options.num_centroids));
  return codebook;
}

}  // namespace veloxquant
