#include "veloxquant/quantize/additive_codebook.h"

#include <algorithm>

#include "veloxquant/core/random.h"
#include "veloxquant/kernels/nearest_pair.h"
#include "veloxquant/kernels/ordered_product.h"
#include "veloxquant/quantize/kmeans.h"

namespace veloxquant {
namespace {

// Rows whose scores by both tables stay in the second-level cache.
constexpr std::size_t kBlockRows = 64;

float half_norm(const float* x, std::size_t dim) {
  float sum = 0;
  for (std::size_t i = 0; i < dim; ++i) sum += x[i] * x[i];
  return sum / 2;
}

// Moves the entries of one table to the weighted means of what the other table leaves of their points.
void fit_table(const float* points, std::size_t rows, std::size_t dim, std::span<const float> weights, const std::uint16_t* codes,
               std::size_t stage, std::size_t count, float* tables) {
  std::vector<double> sums(count * (dim + 1));
  const float* other = tables + (1 - stage) * count * dim;
  for (std::size_t i = 0; i < rows; ++i) {
    const double weight = weights.empty() ? 1.0 : weights[i];
    double* sum = sums.data() + codes[2 * i + stage] * (dim + 1);
    const float* rest = other + codes[2 * i + 1 - stage] * dim;
    for (std::size_t j = 0; j < dim; ++j) sum[j] += weight * (points[i * dim + j] - rest[j]);
    sum[dim] += weight;
  }
  float* table = tables + stage * count * dim;
  for (std::size_t c = 0; c < count; ++c) {
    const double* sum = sums.data() + c * (dim + 1);
    if (sum[dim] <= 0) continue;
    for (std::size_t j = 0; j < dim; ++j) table[c * dim + j] = static_cast<float>(sum[j] / sum[dim]);
  }
}

}  // namespace

AdditiveCodebook::AdditiveCodebook(std::vector<float> tables, int stages, int num_centroids, int dim)
    : tables_(std::move(tables)),
      stages_(stages),
      count_(static_cast<std::size_t>(num_centroids)),
      dim_(static_cast<std::size_t>(dim)) {
  prepare();
}

void AdditiveCodebook::prepare() {
  if (stages_ == 1) {
    nearest_.assign(1, NearestCentroid(tables_, count_, dim_));
    return;
  }
  half_norms_.resize(2 * count_);
  for (std::size_t i = 0; i < half_norms_.size(); ++i) half_norms_[i] = half_norm(tables_.data() + i * dim_, dim_);
  opposite_.resize(tables_.size());
  for (std::size_t i = 0; i < half_norms_.size(); ++i)
    for (std::size_t j = 0; j < dim_; ++j) opposite_[j * half_norms_.size() + i] = -tables_[i * dim_ + j];
  std::vector<float> second(count_ * dim_);  // by dimension
  for (std::size_t i = 0; i < count_; ++i)
    for (std::size_t j = 0; j < dim_; ++j) second[j * count_ + i] = entry(1, i)[j];
  cross_.resize(count_ * count_);
  ordered_product(entry(0, 0), count_, dim_, dim_, second.data(), count_, nullptr, cross_.data(), count_);
}

AdditiveCodebook AdditiveCodebook::train(const float* points, std::size_t rows, std::size_t stride, int dim,
                                         std::span<const float> weights, const TrainOptions& options) {
  const auto width = static_cast<std::size_t>(dim), count = static_cast<std::size_t>(options.num_centroids);
  const KMeansOptions kmeans_options{
      .num_centroids = options.num_centroids, .max_iter = options.max_iter, .seed = Random(options.seed).next()};
  std::vector<float> tables = kmeans(points, rows, stride, width, kmeans_options, weights).centroids;
  if (options.stages == 1) return {std::move(tables), 1, options.num_centroids, dim};

  std::vector<float> dense(rows * width);
  for (std::size_t i = 0; i < rows; ++i) std::copy_n(points + i * stride, width, dense.data() + i * width);
  std::vector<std::uint16_t> codes(2 * rows);
  std::vector<float> rest = dense;
  NearestCentroid(tables, count, width)(dense.data(), rows, width, codes.data(), 2, nullptr);
  for (std::size_t i = 0; i < rows; ++i)
    for (std::size_t j = 0; j < width; ++j) rest[i * width + j] -= tables[codes[2 * i] * width + j];
  const auto second = kmeans(rest.data(), rows, width, width, kmeans_options, weights).centroids;
  tables.insert(tables.end(), second.begin(), second.end());
  AdditiveCodebook codebook(std::move(tables), 2, options.num_centroids, dim);
  for (int i = 0; i < options.joint_iter; ++i) {
    codebook.encode_pairs(dense.data(), rows, width, codes.data(), 2);
    // Each table is the best one for the other as it stands: some rounds bring both near the best for these codes.
    for (int round = 0; round < 3; ++round)
      for (const std::size_t stage : {std::size_t{1}, std::size_t{0}})
        fit_table(dense.data(), rows, width, weights, codes.data(), stage, count, codebook.tables_.data());
    codebook.prepare();
  }
  return codebook;
}

void AdditiveCodebook::encode(const float* points, std::size_t rows, std::size_t stride, std::uint16_t* codes,
                              std::size_t code_stride) const {
  if (stages_ == 1) return nearest_[0](points, rows, stride, codes, code_stride, nullptr);
  encode_pairs(points, rows, stride, codes, code_stride);
}

void AdditiveCodebook::encode_pairs(const float* points, std::size_t rows, std::size_t stride, std::uint16_t* codes,
                                    std::size_t code_stride) const {
  std::vector<float> scores(std::min(rows, kBlockRows) * 2 * count_);
  for (std::size_t begin = 0; begin < rows; begin += kBlockRows) {
    const std::size_t block = std::min(kBlockRows, rows - begin);
    ordered_product(points + begin * stride, block, dim_, stride, opposite_.data(), 2 * count_, half_norms_.data(), scores.data(),
                    2 * count_);
    for (std::size_t r = 0; r < block; ++r) {
      float* first = scores.data() + r * 2 * count_;
      const auto pair = nearest_pair(first, first + count_, cross_.data(), count_, std::min(kBeam, count_));
      codes[(begin + r) * code_stride] = pair.first;
      codes[(begin + r) * code_stride + 1] = pair.second;
    }
  }
}

}  // namespace veloxquant
