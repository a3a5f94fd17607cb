#include "veloxquant/quantize/vecinfer.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <bit>
#include <cmath>

#include "veloxquant/core/error.h"
#include "veloxquant/core/parallel.h"
#include "veloxquant/core/random.h"
#include "veloxquant/kernels/bit_packing.h"
#include "veloxquant/kernels/hadamard.h"
#include "veloxquant/quantize/kmeans.h"
#include "veloxquant/quantize/parameters.h"

namespace veloxquant {
namespace {

constexpr int kNumCentroids = 256, kCodeBits = 8;
constexpr int kMaxWidth = 8;

// Rows that codebooks are trained on: 128 a centroid, beyond which errors on other data hardly fall.
constexpr std::size_t kTrainingRows = 32768;

std::vector<double> widths(int dim) {
  std::vector<double> result;
  if (!is_power_of_two(static_cast<std::size_t>(dim))) return result;
  for (int subspaces = 1; subspaces <= dim && subspaces * kCodeBits <= kMaxWidth * dim; subspaces *= 2)
    result.push_back(static_cast<double>(subspaces * kCodeBits) / dim);
  return result;
}

int subspaces_of(int dim, double width) {
  check_dim(quantizer_method("vecinfer"), dim);
  const auto offered = widths(dim);
  if (std::find(offered.begin(), offered.end(), width) == offered.end())
    throw_invalid("vecinfer", "{} bits are {} sub-spaces of 8-bit codes, which do not divide {}; possible are {:.4g} bits", width,
                  dim * width / kCodeBits, dim, fmt::join(offered, ", "));
  return static_cast<int>(dim * width / kCodeBits);
}

double rate(int dim, double width) {
  return 1.0 * subspaces_of(dim, width) * kCodeBits / dim;
}

// Vectors that are encoded together: their sub-spaces are found in the cache.
constexpr std::size_t kBlockRows = 384;

QuantizerParameters fit(std::span<const float> vectors, int dim, const FitOptions& options) {
  check_vectors("vecinfer", vectors, dim);
  const int subspaces = subspaces_of(dim, options.width);
  std::vector<float> factors = options.side == Side::kKeys ? smooth_factors(vectors, dim) : std::vector<float>{};
  std::vector<float> rows = spread_rows(vectors, dim, kTrainingRows, options.seed);
  if (!factors.empty()) transform_keys(rows, factors);
  Tensor codebook = train_product_codebook(rows, dim, subspaces,
                                           {.num_centroids = kNumCentroids, .max_iter = options.max_iter, .seed = options.seed});
  return vecinfer_parameters(options.side, dim, std::move(factors), std::move(codebook));
}

std::unique_ptr<const Quantizer> make(const QuantizerParameters& parameters) {
  const bool keys = parameters.side == Side::kKeys;
  if (keys) {
    expect_parameters(parameters, {"num_subspaces", "num_centroids"}, {"codebook", "smooth_factors"});
  } else {
    expect_parameters(parameters, {"num_subspaces", "num_centroids"}, {"codebook"});
  }
  const int dim = parameters.dim, subspaces = static_cast<int>(number_in(parameters, "num_subspaces", 1, dim)),
            centroids = static_cast<int>(number_in(parameters, "num_centroids", 2, 4096));
  if (dim % subspaces != 0) throw_invalid("vecinfer", "num_subspaces: expected a divisor of {}, got {}", dim, subspaces);
  if (!is_power_of_two(static_cast<std::size_t>(centroids)))
    throw_invalid("vecinfer", "num_centroids: expected a power of two, got {}", centroids);
  if (keys && !is_power_of_two(static_cast<std::size_t>(dim)))
    throw_invalid("vecinfer", "dim: expected a power of two, got {}", dim);
  std::vector<float> factors;
  if (keys) factors = tensor_of(parameters, "smooth_factors", {dim}).values;
  for (const float factor : factors)
    if (factor <= 0) throw_invalid("vecinfer", "smooth_factors: expected positive values, got {}", factor);
  return std::make_unique<VecInferQuantizer>(std::move(factors),
                                             tensor_of(parameters, "codebook", {subspaces, centroids, dim / subspaces}));
}

template <class Scale>
void scale_rows(std::span<float> vectors, std::span<const float> factors, const Scale& scale) {
  for (std::size_t i = 0; i < vectors.size(); ++i) vectors[i] = scale(vectors[i], factors[i % factors.size()]);
}

}  // namespace

std::vector<float> smooth_factors(std::span<const float> vectors, int dim) {
  std::vector<float> factors(static_cast<std::size_t>(dim), 0.0f);
  for (std::size_t i = 0; i < vectors.size(); ++i) {
    float& factor = factors[i % factors.size()];
    factor = std::max(factor, std::abs(vectors[i]));
  }
  for (float& factor : factors) factor = factor > 0 ? std::sqrt(factor) : 1.0f;
  return factors;
}

void transform_keys(std::span<float> vectors, std::span<const float> factors) {
  scale_rows(vectors, factors, [](float x, float factor) { return x / factor; });
  hadamard(vectors.data(), vectors.size() / factors.size(), factors.size());
}

void transform_queries(std::span<float> vectors, std::span<const float> factors) {
  scale_rows(vectors, factors, [](float x, float factor) { return x * factor; });
  hadamard(vectors.data(), vectors.size() / factors.size(), factors.size());
}

void restore_keys(std::span<float> vectors, std::span<const float> factors) {
  hadamard(vectors.data(), vectors.size() / factors.size(), factors.size());
  scale_rows(vectors, factors, [](float x, float factor) { return x * factor; });
}

ProductCodebook::ProductCodebook(Tensor codebook) : codebook_(std::move(codebook)) {
  const auto& shape = codebook_.shape;
  const bool fits = shape.size() == 3 && shape[0] > 0 && shape[1] > 0 && shape[1] <= 65536 && shape[2] > 0 &&
                    codebook_.values.size() == static_cast<std::size_t>(shape[0] * shape[1] * shape[2]);
  if (!fits)
    throw_invalid("codebook", "expected a shape [num_subspaces, num_centroids, subspace_dim] with 1 to 65536 centroids, got [{}]",
                  fmt::join(shape, ", "));
  check_vectors("codebook", codebook_.values, 1);
  num_subspaces_ = static_cast<int>(shape[0]);
  num_centroids_ = static_cast<int>(shape[1]);
  subspace_dim_ = static_cast<int>(shape[2]);
  const auto size = static_cast<std::size_t>(num_centroids_) * static_cast<std::size_t>(subspace_dim_);
  for (std::size_t s = 0; s < static_cast<std::size_t>(num_subspaces_); ++s)
    nearest_.emplace_back(std::span(codebook_.values).subspan(s * size, size), static_cast<std::size_t>(num_centroids_),
                          static_cast<std::size_t>(subspace_dim_));
}

void ProductCodebook::encode(std::span<const float> vectors, std::span<std::uint16_t> codes) const {
  const auto stride = static_cast<std::size_t>(dim()), rows = vectors.size() / stride;
  parallel_for(rows, kBlockRows, [&](std::size_t begin, std::size_t end) {
    for (std::size_t s = 0; s < nearest_.size(); ++s)
      nearest_[s](vectors.data() + begin * stride + s * static_cast<std::size_t>(subspace_dim_), end - begin, stride,
                  codes.data() + begin * nearest_.size() + s, nearest_.size(), nullptr);
  });
}

void ProductCodebook::decode(std::span<const std::uint16_t> codes, std::span<float> vectors) const {
  const auto width = static_cast<std::size_t>(subspace_dim_), centroids = static_cast<std::size_t>(num_centroids_);
  for (std::size_t i = 0; i < codes.size(); ++i) {
    const std::size_t subspace = i % nearest_.size();
    std::copy_n(codebook_.values.begin() + static_cast<std::ptrdiff_t>((subspace * centroids + codes[i]) * width), width,
                vectors.begin() + static_cast<std::ptrdiff_t>(i * width));
  }
}

void ProductCodebook::query_tables(std::span<const float> queries, std::span<float> tables) const {
  const auto width = static_cast<std::size_t>(subspace_dim_), centroids = static_cast<std::size_t>(num_centroids_);
  parallel_for(queries.size() / width, nearest_.size(), [&](std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i) {
      const float* query = queries.data() + i * width;
      const float* centroid = codebook_.values.data() + i % nearest_.size() * centroids * width;
      for (std::size_t c = 0; c < centroids; ++c, centroid += width) {
        float sum = 0;
        for (std::size_t j = 0; j < width; ++j) sum += query[j] * centroid[j];
        tables[i * centroids + c] = sum;
      }
    }
  });
}

VecInferQuantizer::VecInferQuantizer(std::vector<float> factors, Tensor codebook)
    : smooth_factors_(std::move(factors)),
      codebook_(std::move(codebook)),
      code_bits_(std::max(1, static_cast<int>(std::bit_width(static_cast<unsigned>(codebook_.num_centroids() - 1))))) {}

std::size_t VecInferQuantizer::encoded_bytes(std::size_t tokens) const {
  return tokens * packed_bytes(static_cast<std::size_t>(codebook_.num_subspaces()), code_bits_);
}

void VecInferQuantizer::encode(std::span<const float> vectors, std::span<std::uint8_t> encoded) const {
  std::vector<float> rows(vectors.begin(), vectors.end());
  if (!smooth_factors_.empty()) transform_keys(rows, smooth_factors_);
  const auto subspaces = static_cast<std::size_t>(codebook_.num_subspaces());
  std::vector<std::uint16_t> codes(rows.size() / static_cast<std::size_t>(dim()) * subspaces);
  codebook_.encode(rows, codes);
  for (std::size_t token = 0; token * subspaces < codes.size(); ++token)
    pack_bits(std::span(codes).subspan(token * subspaces, subspaces), code_bits_, encoded.data() + token * encoded_bytes(1));
}

void VecInferQuantizer::decode(std::span<const std::uint8_t> encoded, std::span<float> vectors) const {
  const auto subspaces = static_cast<std::size_t>(codebook_.num_subspaces());
  std::vector<std::uint16_t> codes(vectors.size() / static_cast<std::size_t>(dim()) * subspaces);
  for (std::size_t token = 0; token * subspaces < codes.size(); ++token)
    unpack_bits(encoded.data() + token * encoded_bytes(1), code_bits_, std::span(codes).subspan(token * subspaces, subspaces));
  codebook_.decode(codes, vectors);
  if (!smooth_factors_.empty()) restore_keys(vectors, smooth_factors_);
}

QuantizerParameters vecinfer_parameters(Side side, int dim, std::vector<float> factors, Tensor codebook) {
  QuantizerParameters parameters{.method = "vecinfer", .side = side, .dim = dim, .numbers = {}, .tensors = {}};
  parameters.numbers = {{"num_subspaces", codebook.shape.at(0)}, {"num_centroids", codebook.shape.at(1)}};
  parameters.tensors.emplace("codebook", std::move(codebook));
  if (!factors.empty()) parameters.tensors.emplace("smooth_factors", Tensor{{dim}, std::move(factors)});
  return parameters;
}

QuantizerMethod vecinfer_method() {
  return {"vecinfer", "a power of two", widths, rate, fit, make, /* least_vectors= */ kNumCentroids};
}

}  // namespace veloxquant
