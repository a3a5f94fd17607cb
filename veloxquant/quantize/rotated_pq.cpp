#include "veloxquant/quantize/rotated_pq.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>

#include "veloxquant/core/error.h"
#include "veloxquant/core/random.h"
#include "veloxquant/kernels/gemm.h"
#include "veloxquant/kernels/ordered_product.h"
#include "veloxquant/quantize/half.h"
#include "veloxquant/quantize/parameters.h"

namespace veloxquant {
namespace {

constexpr const char* kName = "rotated_pq";
constexpr int kMaxCentroids = 256, kCodeBits = 8, kMaxPatches = 64;
constexpr int kPatchBits = 4;
constexpr double kRidge = 0.01;  // of the metric's mean diagonal

// Vectors that K-means looks at: 128 a centroid, as for vecinfer.
constexpr std::size_t kTrainingRows = 32768;

// See stages_for().
constexpr std::size_t kRowsOfTwoStages = 8192;

// Of one sub-space: its columns of the rotated vector and its codes of the encoded one.
struct Subspace {
  int begin, width, first_code, codes;
};

// `codes` codes over `dim` columns, `stages` a sub-space, the last one the rest.  Widths are in proportion to codes, so that those
// of equal codes differ by one at most.
std::vector<Subspace> layout(int dim, int codes, int stages) {
  std::vector<Subspace> subspaces;
  for (int first = 0; first < codes; first += stages) {
    const int own = std::min(stages, codes - first), begin = dim * first / codes;
    subspaces.push_back({begin, dim * (first + own) / codes - begin, first, own});
  }
  return subspaces;
}

// In columns of the rotated vector: kPlane cuts between planes of two.
std::vector<Subspace> layout(int dim, int codes, int stages, Rotation rotation) {
  if (rotation == Rotation::kFull) return layout(dim, codes, stages);
  auto subspaces = layout(dim / 2, codes, stages);
  for (auto& subspace : subspaces) subspace.begin *= 2, subspace.width *= 2;
  return subspaces;
}

int most_codes(int dim, Rotation rotation) {
  return rotation == Rotation::kFull ? dim : dim / 2;
}

// The water level θ at which Σ ½·log₂(variance / θ) over variances above it is `bits` (Cover and Thomas, Theorem 10.3.3).
double log_water_level(const std::vector<double>& log_variances, double bits) {
  std::vector<double> sorted = log_variances;
  std::sort(sorted.rbegin(), sorted.rend());
  double sum = 0, level = 0;
  for (std::size_t n = 1; n <= sorted.size(); ++n) {
    sum += sorted[n - 1];
    level = (sum - 2 * std::log(2.0) * bits) / static_cast<double>(n);
    if (n == sorted.size() || level >= sorted[n]) break;
  }
  return level;
}

// Which item goes to which place, so that what sub-spaces have to describe above the water level is even over their codes.
std::vector<int> balance(const std::vector<double>& variances, const std::vector<Subspace>& subspaces, int codes) {
  const double largest = *std::max_element(variances.begin(), variances.end());
  std::vector<double> logs;
  for (const double variance : variances) logs.push_back(std::log(std::max(variance, 1e-12 * std::max(largest, 1e-300))));
  const double level = log_water_level(logs, 1.0 * codes * kCodeBits);
  std::vector<int> order(variances.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return logs[static_cast<std::size_t>(a)] > logs[static_cast<std::size_t>(b)]; });
  std::vector<double> load(subspaces.size());
  std::vector<std::vector<int>> members(subspaces.size());
  for (const int item : order) {
    std::size_t best = subspaces.size();
    for (std::size_t s = 0; s < subspaces.size(); ++s)
      if (static_cast<int>(members[s].size()) < subspaces[s].width && (best == subspaces.size() || load[s] < load[best])) best = s;
    members[best].push_back(item);
    load[best] += std::max(0.0, logs[static_cast<std::size_t>(item)] - level) / subspaces[best].codes;
  }
  std::vector<int> places;
  for (const auto& some : members) places.insert(places.end(), some.begin(), some.end());
  return places;
}

// y [rows, dim] = (x − mean) · matrix.
void rotate(const float* x, std::size_t rows, std::span<const float> mean, std::span<const float> matrix, float* y) {
  const std::size_t dim = mean.size();
  std::vector<float> centred(rows * dim);
  for (std::size_t i = 0; i < centred.size(); ++i) centred[i] = x[i] - mean[i % dim];
  ordered_product(centred.data(), rows, dim, dim, matrix.data(), dim, nullptr, y, dim);
}

std::vector<float> to_float(std::span<const double> x) {
  return {x.begin(), x.end()};
}

Tensor matrix_tensor(const SquareMatrix& matrix, std::size_t dim) {
  const auto size = static_cast<std::int64_t>(dim);
  return {{size, size}, to_float(matrix)};
}

}  // namespace

SquareMatrix ridged_metric(SquareMatrix metric, std::size_t dim) {
  double trace = 0;
  for (std::size_t i = 0; i < dim && !metric.empty(); ++i) trace += metric[i * dim + i];
  const bool silent = !(trace > 0);
  if (silent) metric.assign(dim * dim, 0.0);
  for (double& value : metric) value *= silent ? 0.0 : static_cast<double>(dim) / trace;
  for (std::size_t i = 0; i < dim; ++i) metric[i * dim + i] += silent ? 1.0 : kRidge;
  return metric;
}

int stages_for(std::size_t rows) {
  return rows >= kRowsOfTwoStages ? 2 : 1;
}

RotatedPqFitter::RotatedPqFitter(std::span<const float> vectors, int dim, ErrorMetric metric, Rotation rotation)
    : vectors_(vectors),
      dim_(static_cast<std::size_t>(dim)),
      rotation_(rotation),
      weights_(std::move(metric.weights)),
      metric_(std::move(metric.matrix)) {
  check_vectors(kName, vectors, dim);
  const std::size_t rows = vectors.size() / dim_;
  if (rows == 0) throw_invalid(kName, "0 vectors to fit to are too few; expected at least one");
  if (rotation == Rotation::kPlane && dim % 2 != 0) throw_invalid(kName, "plane: expected an even dim, got {}", dim);
  if (!metric_.empty() && metric_.size() != dim_ * dim_)
    throw_invalid(kName, "metric: expected {} by {} values, got {}", dim, dim, metric_.size());
  if (!weights_.empty() && weights_.size() != rows) throw_invalid(kName, "weights: expected {}, got {}", rows, weights_.size());
  for (const float weight : weights_)
    if (!(weight >= 0) || !std::isfinite(weight)) throw_invalid(kName, "weights: expected numbers from 0, got {}", weight);
  for (const double value : metric_)
    if (!std::isfinite(value)) throw_invalid(kName, "metric: expected finite values, got {}", value);

  // A unit that the model does not listen to has neither a metric nor weights of its own.
  metric_ = ridged_metric(std::move(metric_), dim_);
  double total = 0;
  for (const float weight : weights_) total += weight;
  if (!(total > 0)) weights_.assign(rows, 1.0f), total = static_cast<double>(rows);

  mean_.assign(dim_, 0.0);
  for (std::size_t i = 0; i < rows; ++i)
    for (std::size_t j = 0; j < dim_; ++j) mean_[j] += weights_[i] / total * vectors[i * dim_ + j];
  std::vector<float> centred(rows * dim_);
  for (std::size_t i = 0; i < rows; ++i)
    for (std::size_t j = 0; j < dim_; ++j)
      centred[i * dim_ + j] = static_cast<float>(std::sqrt(weights_[i] / total) * (vectors[i * dim_ + j] - mean_[j]));
  std::vector<float> covariance(dim_ * dim_);
  gemm(true, false, dim, dim, static_cast<int>(rows), 1.0f, centred.data(), dim, centred.data(), dim, 0.0f, covariance.data(), dim);
  covariance_.assign(covariance.begin(), covariance.end());
  if (rotation == Rotation::kPlane) return;
  const auto root = symmetric_power(metric_, dim_, 0.5);
  const auto eigen = symmetric_eigen(multiply(multiply(root, covariance_, dim_), root, dim_), dim_);
  SquareMatrix columns(dim_ * dim_);  // LAPACK's vectors are rows
  for (std::size_t i = 0; i < dim_; ++i)
    for (std::size_t j = 0; j < dim_; ++j) columns[j * dim_ + i] = eigen.vectors[i * dim_ + j];
  whitening_ = multiply(root, columns, dim_);
  variances_ = eigen.values;
}

namespace {

SquareMatrix permuted_columns(const SquareMatrix& matrix, const std::vector<int>& places) {
  const std::size_t dim = places.size();
  SquareMatrix result(dim * dim);
  for (std::size_t i = 0; i < dim; ++i)
    for (std::size_t j = 0; j < dim; ++j) result[i * dim + j] = matrix[i * dim + static_cast<std::size_t>(places[j])];
  return result;
}

SquareMatrix block_of(const SquareMatrix& matrix, std::size_t dim, std::span<const std::size_t> indices) {
  SquareMatrix block;
  for (const std::size_t i : indices)
    for (const std::size_t j : indices) block.push_back(matrix[i * dim + j]);
  return block;
}

double determinant_of_two(const SquareMatrix& m) {
  return std::max(m[0] * m[3] - m[1] * m[2], 0.0);
}

// A block G^½ for each sub-space, over the planes that fall into it.
SquareMatrix plane_transform(const SquareMatrix& metric, const SquareMatrix& covariance, std::size_t dim,
                             const std::vector<Subspace>& subspaces, int codes) {
  const std::size_t half = dim / 2;
  std::vector<double> variances;
  for (std::size_t i = 0; i < half; ++i) {
    const std::size_t plane[] = {i, i + half};
    variances.push_back(determinant_of_two(block_of(metric, dim, plane)) * determinant_of_two(block_of(covariance, dim, plane)));
  }
  std::vector<Subspace> planes = subspaces;
  for (auto& subspace : planes) subspace.begin /= 2, subspace.width /= 2;
  const auto places = balance(variances, planes, codes);
  SquareMatrix transform(dim * dim);
  for (const auto& subspace : planes) {
    std::vector<std::size_t> indices;
    for (int i = subspace.begin; i < subspace.begin + subspace.width; ++i) {
      const auto plane = static_cast<std::size_t>(places[static_cast<std::size_t>(i)]);
      indices.insert(indices.end(), {plane, plane + half});
    }
    const auto root = symmetric_power(block_of(metric, dim, indices), indices.size(), 0.5);
    for (std::size_t i = 0; i < indices.size(); ++i)
      for (std::size_t j = 0; j < indices.size(); ++j)
        transform[indices[i] * dim + 2 * static_cast<std::size_t>(subspace.begin) + j] = root[i * indices.size() + j];
  }
  return transform;
}

void check_options(int dim, Rotation rotation, const RotatedPqOptions& options) {
  const auto check = [](const char* what, int value, int least, int most) {
    if (value < least || value > most) throw_invalid(kName, "{}: expected {} to {}, got {}", what, least, most, value);
  };
  check("codes", options.codes, 1, most_codes(dim, rotation));
  check("stages", options.stages, 1, AdditiveCodebook::kMaxStages);
  check("patches", options.patches, 0, kMaxPatches);
}

}  // namespace

QuantizerParameters RotatedPqFitter::fit(Side side, const RotatedPqOptions& options) const {
  const int dim = static_cast<int>(dim_);
  check_options(dim, rotation_, options);
  const auto subspaces = layout(dim, options.codes, options.stages, rotation_);
  const auto transform = rotation_ == Rotation::kFull ? permuted_columns(whitening_, balance(variances_, subspaces, options.codes))
                                                      : plane_transform(metric_, covariance_, dim_, subspaces, options.codes);
  const std::size_t rows = vectors_.size() / dim_;
  const auto mean = to_float(mean_), matrix = to_float(transform);
  std::vector<float> z(rows * dim_);
  rotate(vectors_.data(), rows, mean, matrix, z.data());

  const int centroids = static_cast<int>(std::min<std::size_t>(kMaxCentroids, rows));
  const auto table = static_cast<std::size_t>(centroids) * dim_;
  Tensor codebook{{options.stages, centroids, dim}, std::vector<float>(static_cast<std::size_t>(options.stages) * table)};
  for (const auto& [begin, width, first_code, codes] : subspaces) {
    const auto trained = AdditiveCodebook::train(z.data() + begin, rows, dim_, width, weights_,
                                                 {.stages = codes,
                                                  .num_centroids = centroids,
                                                  .max_iter = options.max_iter,
                                                  .seed = Random(options.seed, static_cast<std::uint64_t>(first_code)).next()});
    for (int stage = 0; stage < codes; ++stage)
      for (std::size_t c = 0; c < static_cast<std::size_t>(centroids); ++c)
        std::copy_n(
            trained.entry(stage, c), width,
            codebook.values.begin() + static_cast<std::ptrdiff_t>(static_cast<std::size_t>(stage) * table + c * dim_) + begin);
  }
  QuantizerParameters parameters{.method = kName, .side = side, .dim = dim, .numbers = {}, .tensors = {}};
  parameters.numbers = {{"codes", options.codes},
                        {"stages", options.stages},
                        {"num_centroids", centroids},
                        {"patches", options.patches},
                        {"plane", rotation_ == Rotation::kPlane ? 1 : 0}};
  parameters.tensors.emplace("mean", Tensor{{dim}, mean});
  parameters.tensors.emplace("transform", matrix_tensor(transform, dim_));
  parameters.tensors.emplace("codebook", std::move(codebook));
  return with_byte_tables(std::move(parameters));
}

namespace {

// What the numbers of a unit, its mean and its transform say.
struct Basis {
  Rotation rotation;
  int dim, codes, stages, centroids, patches;
  std::vector<Subspace> subspaces;
  std::vector<float> mean, transform, inverse;
  std::vector<std::vector<std::size_t>> planes;  // kPlane: of each sub-space

  std::size_t width() const { return static_cast<std::size_t>(dim); }

  // Dimensions of a vector that are the columns of a sub-space of kPlane.
  std::vector<std::size_t> dimensions(std::size_t subspace) const {
    std::vector<std::size_t> result;
    for (const std::size_t plane : planes[subspace]) result.insert(result.end(), {plane, plane + width() / 2});
    return result;
  }
};

// The planes that columns begin … begin + width − 1 of the transform read.
std::vector<std::size_t> planes_read(const std::vector<float>& transform, std::size_t dim, const Subspace& subspace) {
  std::vector<std::size_t> planes;
  for (std::size_t plane = 0; plane < dim / 2; ++plane) {
    bool here = false;
    for (const std::size_t row : {plane, plane + dim / 2})
      for (int i = subspace.begin; i < subspace.begin + subspace.width; ++i)
        here |= transform[row * dim + static_cast<std::size_t>(i)] != 0;
    if (here) planes.push_back(plane);
  }
  return planes;
}

Basis basis_of(const QuantizerParameters& parameters) {
  const int dim = parameters.dim;
  const auto number = [&](const char* name, std::int64_t least, std::int64_t most) {
    return static_cast<int>(number_in(parameters, name, least, most));
  };
  Basis basis;
  basis.rotation = number("plane", 0, 1) == 1 ? Rotation::kPlane : Rotation::kFull;
  if (basis.rotation == Rotation::kPlane && dim % 2 != 0) throw_invalid(kName, "plane: expected an even dim, got {}", dim);
  basis.dim = dim;
  basis.codes = number("codes", 1, most_codes(dim, basis.rotation));
  basis.stages = number("stages", 1, AdditiveCodebook::kMaxStages);
  basis.centroids = number("num_centroids", 1, kMaxCentroids);
  basis.patches = number("patches", 0, kMaxPatches);
  basis.subspaces = layout(dim, basis.codes, basis.stages, basis.rotation);
  basis.mean = tensor_of(parameters, "mean", {dim}).values;
  basis.transform = tensor_of(parameters, "transform", {dim, dim}).values;
  try {
    basis.inverse = to_float(veloxquant::inverse(SquareMatrix(basis.transform.begin(), basis.transform.end()), basis.width()));
  } catch (const std::runtime_error& error) {
    throw_invalid(kName, "transform: {}", error.what());
  }
  for (const float value : basis.inverse)
    if (!std::isfinite(value)) throw_invalid(kName, "transform: its inverse holds {}", value);
  if (basis.rotation == Rotation::kFull) return basis;
  for (const auto& subspace : basis.subspaces) {
    basis.planes.push_back(planes_read(basis.transform, basis.width(), subspace));
    if (2 * basis.planes.back().size() != static_cast<std::size_t>(subspace.width))
      throw_invalid(kName, "transform: expected columns {} to {} to read {} planes, got {}", subspace.begin,
                    subspace.begin + subspace.width - 1, subspace.width / 2, basis.planes.back().size());
  }
  return basis;
}

// One stage of a sub-space, [entries, width], to where its bytes are from z (inverse A⁻¹, with μ in the first stage), or back
// (transform A, μ taken out before).
std::vector<float> to_planes(const Basis& basis, std::size_t subspace, int stage, std::vector<float> table) {
  const auto dimensions = basis.dimensions(subspace);
  const std::size_t width = dimensions.size(), begin = static_cast<std::size_t>(basis.subspaces[subspace].begin);
  std::vector<float> turned(table.size());
  for (std::size_t entry = 0; entry < table.size(); entry += width)
    for (std::size_t j = 0; j < width; ++j) {
      double sum = stage == 0 ? basis.mean[dimensions[j]] : 0.0f;
      for (std::size_t i = 0; i < width; ++i)
        sum += static_cast<double>(table[entry + i]) * basis.inverse[(begin + i) * basis.width() + dimensions[j]];
      turned[entry + j] = static_cast<float>(sum);
    }
  return turned;
}

std::vector<float> from_planes(const Basis& basis, std::size_t subspace, int stage, std::vector<float> table) {
  const auto dimensions = basis.dimensions(subspace);
  const std::size_t width = dimensions.size(), begin = static_cast<std::size_t>(basis.subspaces[subspace].begin);
  std::vector<float> turned(table.size());
  for (std::size_t entry = 0; entry < table.size(); entry += width)
    for (std::size_t j = 0; j < width; ++j) {
      double sum = 0;
      for (std::size_t i = 0; i < width; ++i)
        sum += (static_cast<double>(table[entry + i]) - (stage == 0 ? basis.mean[dimensions[i]] : 0.0f)) *
               basis.transform[dimensions[i] * basis.width() + begin + j];
      turned[entry + j] = static_cast<float>(sum);
    }
  return turned;
}

// Where entry `entry` of a stage stands in tensors [stages, num_centroids, dim], in the columns of a sub-space.
std::size_t place_of_entry(const Basis& basis, const Subspace& subspace, int stage, std::size_t entry) {
  return (static_cast<std::size_t>(stage * basis.centroids) + entry) * basis.width() + static_cast<std::size_t>(subspace.begin);
}

void expect_names(const QuantizerParameters& parameters, std::initializer_list<std::string_view> tensors,
                  std::initializer_list<std::string_view> byte_tensors) {
  expect_parameters(parameters, {"codes", "stages", "num_centroids", "patches", "plane"}, tensors, byte_tensors);
}

// rows [count, width] times an orthonormal matrix (DCT-II) that gives all columns about the same variance.  A sub-space may be
// turned as one likes, and columns of one scale lose least by rounding where they are alike.
void mix_columns(float* rows, std::size_t count, std::size_t width, std::size_t stride) {
  std::vector<double> matrix(width * width), mixed(width);
  for (std::size_t i = 0; i < width; ++i)
    for (std::size_t j = 0; j < width; ++j)
      matrix[i * width + j] =
          std::sqrt((j == 0 ? 1.0 : 2.0) / static_cast<double>(width)) *
          std::cos(std::numbers::pi * (static_cast<double>(i) + 0.5) * static_cast<double>(j) / static_cast<double>(width));
  for (std::size_t row = 0; row < count; ++row, rows += stride) {
    std::fill(mixed.begin(), mixed.end(), 0.0);
    for (std::size_t i = 0; i < width; ++i)
      for (std::size_t j = 0; j < width; ++j) mixed[j] += static_cast<double>(rows[i]) * matrix[i * width + j];
    std::copy(mixed.begin(), mixed.end(), rows);
  }
}

// Those of a sub-space, out of tensors of all of them; units: those of the sub-spaces before it.
ByteTables tables_of(const Basis& basis, const Subspace& subspace, std::size_t units, const ByteTensor& entries,
                     const Tensor& offsets, const Tensor& scales) {
  const auto width = static_cast<std::size_t>(subspace.width), begin = static_cast<std::size_t>(subspace.begin);
  ByteTables tables{width, {}, {}, {}};
  for (int stage = 0; stage < subspace.codes; ++stage) {
    auto& table = tables.entries.emplace_back();
    for (std::size_t entry = 0; entry < static_cast<std::size_t>(basis.centroids); ++entry) {
      const auto row = entries.values.begin() + static_cast<std::ptrdiff_t>(place_of_entry(basis, subspace, stage, entry));
      table.insert(table.end(), row, row + subspace.width);
    }
    const auto row = offsets.values.begin() + static_cast<std::ptrdiff_t>(static_cast<std::size_t>(stage) * basis.width() + begin);
    tables.offsets.emplace_back(row, row + subspace.width);
  }
  const auto first = scales.values.begin() + static_cast<std::ptrdiff_t>(units);
  tables.scales.assign(first, first + static_cast<std::ptrdiff_t>(byte_units(width)));
  return tables;
}

void check_tables(const ByteTables& tables) {
  for (const float scale : tables.scales)
    if (!(scale > 0)) throw_invalid(kName, "scales: expected positive values, got {}", scale);
  for (std::size_t column = 0; column < tables.width; ++column) {
    int sum = 0;
    for (std::size_t stage = 0; stage < tables.entries.size(); ++stage) {
      const float offset = tables.offsets[stage][column];
      if (!(std::abs(offset) <= kMostByteOffset) || offset != std::nearbyint(offset))
        throw_invalid(kName, "offsets: expected whole numbers from -{0} to {0}, got {1}", kMostByteOffset, offset);
      int most = 0;
      for (std::size_t at = column; at < tables.entries[stage].size(); at += tables.width)
        most = std::max<int>(most, tables.entries[stage][at]);
      sum += most;
    }
    if (std::abs(tables.offset(column)) > kMostByteOffset)
      throw_invalid(kName, "offsets: expected those of both stages to be within {0} of 0 together, got {1}", kMostByteOffset,
                    tables.offset(column));
    if (sum > kMostByteSum) throw_invalid(kName, "entries: expected sums of two up to {}, got {}", kMostByteSum, sum);
  }
}

}  // namespace

QuantizerParameters with_byte_tables(QuantizerParameters parameters) {
  expect_names(parameters, {"mean", "transform", "codebook"}, {});
  const Basis basis = basis_of(parameters);
  auto codebook = tensor_of(parameters, "codebook", {basis.stages, basis.centroids, basis.dim}).values;
  if (basis.rotation == Rotation::kFull) {
    auto& transform = parameters.tensors.at("transform").values;
    for (const auto& subspace : basis.subspaces)
      for (auto* rows : {&transform, &codebook})
        mix_columns(rows->data() + subspace.begin, rows->size() / basis.width(), static_cast<std::size_t>(subspace.width),
                    basis.width());
  }
  ByteTensor entries{{basis.stages, basis.centroids, basis.dim}, std::vector<std::uint8_t>(codebook.size())};
  Tensor offsets{{basis.stages, basis.dim}, std::vector<float>(static_cast<std::size_t>(basis.stages) * basis.width())};
  std::vector<float> scales;
  for (std::size_t s = 0; s < basis.subspaces.size(); ++s) {
    const auto& subspace = basis.subspaces[s];
    std::vector<std::vector<float>> tables(static_cast<std::size_t>(subspace.codes));
    for (int stage = 0; stage < subspace.codes; ++stage) {
      auto& table = tables[static_cast<std::size_t>(stage)];
      for (std::size_t entry = 0; entry < static_cast<std::size_t>(basis.centroids); ++entry) {
        const auto row = codebook.begin() + static_cast<std::ptrdiff_t>(place_of_entry(basis, subspace, stage, entry));
        table.insert(table.end(), row, row + subspace.width);
      }
      if (!basis.planes.empty()) table = to_planes(basis, s, stage, std::move(table));
      for (const float value : table)
        if (!std::isfinite(value)) throw_invalid(kName, "codebook: an entry is {} where it is rounded", value);
    }
    const auto rounded = round_to_bytes(tables, static_cast<std::size_t>(subspace.width));
    for (std::size_t stage = 0; stage < tables.size(); ++stage) {
      for (std::size_t entry = 0; entry < static_cast<std::size_t>(basis.centroids); ++entry)
        std::copy_n(
            rounded.entries[stage].begin() + static_cast<std::ptrdiff_t>(entry * rounded.width), rounded.width,
            entries.values.begin() + static_cast<std::ptrdiff_t>(place_of_entry(basis, subspace, static_cast<int>(stage), entry)));
      std::copy(rounded.offsets[stage].begin(), rounded.offsets[stage].end(),
                offsets.values.begin() + static_cast<std::ptrdiff_t>(stage * basis.width()) + subspace.begin);
    }
    scales.insert(scales.end(), rounded.scales.begin(), rounded.scales.end());
  }
  parameters.tensors.erase("codebook");
  parameters.byte_tensors.emplace("entries", std::move(entries));
  parameters.tensors.emplace("offsets", std::move(offsets));
  parameters.tensors.emplace("scales", Tensor{{static_cast<std::int64_t>(scales.size())}, std::move(scales)});
  return parameters;
}

RotatedPqQuantizer::RotatedPqQuantizer(const QuantizerParameters& parameters) {
  expect_names(parameters, {"mean", "transform", "offsets", "scales"}, {"entries"});
  Basis basis = basis_of(parameters);
  dim_ = basis.width();
  codes_ = static_cast<std::size_t>(basis.codes);
  patches_ = static_cast<std::size_t>(basis.patches);
  std::size_t units = 0;
  for (const auto& subspace : basis.subspaces) units += byte_units(static_cast<std::size_t>(subspace.width));
  const auto& entries = byte_tensor_of(parameters, "entries", {basis.stages, basis.centroids, basis.dim});
  const auto &offsets = tensor_of(parameters, "offsets", {basis.stages, basis.dim}),
             &scales = tensor_of(parameters, "scales", {static_cast<std::int64_t>(units)});
  units = 0;
  for (std::size_t s = 0; s < basis.subspaces.size(); ++s) {
    const auto& subspace = basis.subspaces[s];
    const auto& bytes = byte_tables_.emplace_back(tables_of(basis, subspace, units, entries, offsets, scales));
    check_tables(bytes);
    units += bytes.scales.size();
    std::vector<float> tables;
    for (int stage = 0; stage < subspace.codes; ++stage) {
      std::vector<float> table;
      for (std::size_t entry = 0; entry < static_cast<std::size_t>(basis.centroids); ++entry)
        for (std::size_t column = 0; column < bytes.width; ++column)
          table.push_back(bytes.value(static_cast<std::size_t>(stage), entry, column));
      if (!basis.planes.empty()) table = from_planes(basis, s, stage, std::move(table));
      for (const float value : table)
        if (!std::isfinite(value)) throw_invalid(kName, "scales: an entry is {}", value);
      tables.insert(tables.end(), table.begin(), table.end());
    }
    subspaces_.emplace_back(std::move(tables), subspace.codes, basis.centroids, subspace.width);
  }
  mean_ = std::move(basis.mean);
  transform_ = std::move(basis.transform);
  inverse_ = std::move(basis.inverse);
  planes_ = std::move(basis.planes);
}

std::size_t RotatedPqQuantizer::encoded_bytes(std::size_t tokens) const {
  return rotated_pq_bytes(dim(), static_cast<int>(codes_), static_cast<int>(patches_), tokens);
}

void RotatedPqQuantizer::encode_codes(std::span<const float> vectors, std::span<std::uint8_t> codes, std::span<float> rest) const {
  const std::size_t tokens = vectors.size() / dim_;
  std::vector<float> z(tokens * dim_);
  rotate(vectors.data(), tokens, mean_, transform_, z.data());
  std::vector<std::uint16_t> wide(tokens * codes_);
  choose_codes(z, wide);
  std::copy(wide.begin(), wide.end(), codes.begin());
  if (rest.empty()) return;
  look_up(codes.data(), tokens, rest.data());
  for (std::size_t i = 0; i < z.size(); ++i) rest[i] = z[i] - rest[i];
}

void RotatedPqQuantizer::choose_codes(std::span<const float> z, std::span<std::uint16_t> codes) const {
  std::size_t column = 0, code = 0;
  for (const auto& subspace : subspaces_) {
    subspace.encode(z.data() + column, z.size() / dim_, dim_, codes.data() + code, codes_);
    column += static_cast<std::size_t>(subspace.dim());
    code += static_cast<std::size_t>(subspace.stages());
  }
}

void RotatedPqQuantizer::encode(std::span<const float> vectors, std::span<std::uint8_t> encoded) const {
  const std::size_t tokens = vectors.size() / dim_;
  std::vector<float> memory(patches_ > 0 ? std::min(tokens, kBlockTokens) * dim_ : 0);
  std::uint8_t* out = encoded.data();
  for (std::size_t begin = 0; begin < tokens; begin += kBlockTokens) {
    const std::size_t block = std::min(kBlockTokens, tokens - begin);
    const auto rest = std::span(memory).first(patches_ > 0 ? block * dim_ : 0);
    encode_codes(vectors.subspan(begin * dim_, block * dim_), {out, block * codes_}, rest);
    if (patches_ > 0) write_patches(rest, out + block * codes_);
    out += encoded_bytes(block);
  }
}

void RotatedPqQuantizer::decode(std::span<const std::uint8_t> encoded, std::span<float> vectors) const {
  const std::size_t tokens = vectors.size() / dim_;
  std::vector<float> z(std::min(tokens, kBlockTokens) * dim_);
  const std::uint8_t* in = encoded.data();
  const int d = static_cast<int>(dim_);
  for (std::size_t begin = 0; begin < tokens; begin += kBlockTokens) {
    const std::size_t block = std::min(kBlockTokens, tokens - begin);
    look_up(in, block, z.data());
    add_patches(in + block * codes_, block, z.data());
    float* out = vectors.data() + begin * dim_;
    for (std::size_t t = 0; t < block; ++t) std::copy(mean_.begin(), mean_.end(), out + t * dim_);
    gemm(false, false, static_cast<int>(block), d, d, 1.0f, z.data(), d, inverse_.data(), d, 1.0f, out, d);
    in += encoded_bytes(block);
  }
}

void RotatedPqQuantizer::look_up(const std::uint8_t* codes, std::size_t tokens, float* z) const {
  // Bytes of a damaged file may be no codes.
  const auto entry = [](const AdditiveCodebook& subspace, int stage, std::uint8_t code) {
    return subspace.entry(stage, std::min<std::size_t>(code, static_cast<std::size_t>(subspace.num_centroids() - 1)));
  };
  for (std::size_t t = 0; t < tokens; ++t, z += dim_) {
    float* out = z;
    for (const auto& subspace : subspaces_) {
      const auto width = static_cast<std::size_t>(subspace.dim());
      std::copy_n(entry(subspace, 0, *codes++), width, out);
      for (int stage = 1; stage < subspace.stages(); ++stage) {
        const float* more = entry(subspace, stage, *codes++);
        for (std::size_t i = 0; i < width; ++i) out[i] += more[i];
      }
      out += width;
    }
  }
}

void RotatedPqQuantizer::write_patches(std::span<const float> rest, std::uint8_t* bytes) const {
  const std::size_t tokens = rest.size() / dim_;
  std::vector<float> errors(tokens);
  for (std::size_t t = 0; t < tokens; ++t) errors[t] = patch_error(rest.subspan(t * dim_, dim_));
  std::vector<std::size_t> worst(tokens);
  std::iota(worst.begin(), worst.end(), std::size_t{0});
  const auto count = static_cast<std::ptrdiff_t>(patches_of(patches_, tokens));
  std::partial_sort(worst.begin(), worst.begin() + count, worst.end(),
                    [&](std::size_t a, std::size_t b) { return errors[a] != errors[b] ? errors[a] > errors[b] : a < b; });
  std::sort(worst.begin(), worst.begin() + count);
  for (auto t = worst.begin(); t != worst.begin() + count; ++t, bytes += patch_bytes(dim_))
    write_patch(rest.subspan(*t * dim_, dim_), *t, bytes);
}

float RotatedPqQuantizer::patch_error(std::span<const float> rest) {
  float sum = 0;
  for (const float value : rest) sum += value * value;
  return sum;
}

// Place, scale and residuals.
std::size_t RotatedPqQuantizer::patch_bytes(std::size_t dim) {
  return 3 + (dim * kPatchBits + 7) / 8;
}

void RotatedPqQuantizer::write_patch(std::span<const float> rest, std::size_t place, std::uint8_t* bytes) const {
  float largest = 0;
  for (const float value : rest) largest = std::max(largest, std::abs(value));
  bytes[0] = static_cast<std::uint8_t>(place);
  store_half(largest / kPatchCentre, bytes + 1);
  const float scale = load_half(bytes + 1);
  std::fill(bytes + 3, bytes + patch_bytes(dim_), std::uint8_t{0});
  for (std::size_t i = 0; i < dim_; ++i) {
    const float code = scale > 0 ? std::clamp(std::nearbyint(rest[i] / scale + kPatchCentre), 0.0f, 2 * kPatchCentre) : 0.0f;
    bytes[3 + i / 2] |= static_cast<std::uint8_t>(static_cast<unsigned>(code) << (i % 2 * kPatchBits));
  }
}

void RotatedPqQuantizer::add_patch(const std::uint8_t* bytes, std::span<float> z) {
  const float scale = load_half(bytes + 1);
  const auto rest = [&](int code) { return scale * (static_cast<float>(code) - kPatchCentre); };
  const std::uint8_t* codes = bytes + 3;
  for (std::size_t i = 0; i + 2 <= z.size(); i += 2, ++codes) {
    z[i] += rest(*codes & 15);
    z[i + 1] += rest(*codes >> kPatchBits);
  }
  if (z.size() % 2 == 1) z.back() += rest(*codes & 15);
}

void RotatedPqQuantizer::add_patches(const std::uint8_t* bytes, std::size_t tokens, float* z) const {
  for (std::size_t p = 0; p < patches_of(patches_, tokens); ++p, bytes += patch_bytes(dim_))
    add_patch(bytes, {z + std::min<std::size_t>(bytes[0], tokens - 1) * dim_, dim_});
}

std::size_t rotated_pq_bytes(int dim, int codes, int patches, std::size_t tokens) {
  const auto of_block = [&](std::size_t block) {
    return block * static_cast<std::size_t>(codes) + RotatedPqQuantizer::patches_of(static_cast<std::size_t>(patches), block) *
                                                         RotatedPqQuantizer::patch_bytes(static_cast<std::size_t>(dim));
  };
  constexpr std::size_t kBlock = RotatedPqQuantizer::kBlockTokens;
  return tokens / kBlock * of_block(kBlock) + of_block(tokens % kBlock);
}

namespace {

std::vector<double> widths(int dim) {
  std::vector<double> result;
  for (int codes = 1; codes <= dim; ++codes) result.push_back(static_cast<double>(codes * kCodeBits) / dim);
  return result;
}

int codes_of(int dim, double width) {
  check_dim(quantizer_method(kName), dim);
  const double codes = dim * width / kCodeBits, whole = std::nearbyint(codes);
  // A width is a quotient, and need not come back as a whole number.
  constexpr double kRounding = 1e-9;
  if (!(whole >= 1 && whole <= dim && std::abs(codes - whole) <= kRounding * whole))
    throw_invalid(kName, "{} bits are not a whole number of 8-bit codes for {} values; possible are multiples of {} up to 8", width,
                  dim, 1.0 * kCodeBits / dim);
  return static_cast<int>(whole);
}

double rate(int dim, double width) {
  return 1.0 * codes_of(dim, width) * kCodeBits / dim;
}

QuantizerParameters fit(std::span<const float> vectors, int dim, const FitOptions& options) {
  check_vectors(kName, vectors, dim);
  const int codes = codes_of(dim, options.width);
  const auto rows = spread_rows(vectors, dim, kTrainingRows, options.seed);
  const int stages = stages_for(rows.size() / static_cast<std::size_t>(dim));
  return RotatedPqFitter(rows, dim, {}, Rotation::kFull)
      .fit(options.side, {.codes = codes, .stages = stages, .max_iter = options.max_iter, .seed = options.seed});
}

std::unique_ptr<const Quantizer> make(const QuantizerParameters& parameters) {
  return std::make_unique<RotatedPqQuantizer>(parameters);
}

}  // namespace

QuantizerMethod rotated_pq_method() {
  return {kName, "at least 1", widths, rate, fit, make, /* least_vectors= */ 1, /* keys_before_rope= */ true};
}

}  // namespace veloxquant
