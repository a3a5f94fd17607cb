#include "veloxquant/allocators/vecinfer.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include "veloxquant/calibrate/calibration_samples.h"
#include "veloxquant/calibrate/observe.h"
#include "veloxquant/core/error.h"
#include "veloxquant/core/random.h"
#include "veloxquant/kernels/hadamard.h"
#include "veloxquant/quantize/kmeans.h"
#include "veloxquant/quantize/parameters.h"
#include "veloxquant/quantize/vecinfer.h"

namespace veloxquant::allocators::vecinfer {
namespace {

// Whether there are as many values as the shape says.
bool is_whole(const std::vector<std::int64_t>& shape, std::size_t num_values) {
  return std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>()) == static_cast<std::int64_t>(num_values);
}

// Throws unless x is [.., dim] with finite values.
void check_rows(const char* where, const char* name, const Tensor& x, std::int64_t dim) {
  if (x.shape.empty() || x.shape.back() != dim || !is_whole(x.shape, x.values.size()))
    throw_invalid(where, "{}: expected a shape [.., {}], got [{}]", name, dim, fmt::join(x.shape, ", "));
  check_vectors(where, x.values, static_cast<int>(dim));
}

void check_factors(const char* where, const Tensor& factors, const std::vector<std::int64_t>& shape) {
  if (factors.shape != shape || !is_whole(shape, factors.values.size()))
    throw_invalid(where, "smooth_factors: expected a shape [{}], got [{}] with {} values", fmt::join(shape, ", "),
                  fmt::join(factors.shape, ", "), factors.values.size());
  for (const float factor : factors.values)
    if (!(factor > 0) || !std::isfinite(factor))
      throw_invalid(where, "smooth_factors: expected finite values above 0, got {}", factor);
}

// Throws unless the factors are those of one layer.
void check_layer_factors(const char* where, const Tensor& factors) {
  if (factors.shape.size() != 1)
    throw_invalid(where, "smooth_factors: expected those of one layer, a shape [head_dim], got [{}]", fmt::join(factors.shape, ", "));
  const std::size_t head_dim = factors.values.size();
  if (!is_power_of_two(head_dim))
    throw_invalid(where, "smooth_factors: expected a head_dim that is a power of two, got {} values", head_dim);
  check_factors(where, factors, {static_cast<std::int64_t>(head_dim)});
}

std::vector<std::int64_t> with_last(std::vector<std::int64_t> shape, std::initializer_list<std::int64_t> last) {
  shape.pop_back();
  shape.insert(shape.end(), last);
  return shape;
}

}  // namespace

Tensor calibrate_smooth_factors(const LanguageModel& model, const TextEncoder& tokenizer, int num_samples, int sequence_length,
                                const CalibrationOptions& options) {
  const int head_dim = model.config().head_dim;
  const auto samples =
      calibration_samples(model, tokenizer, options.texts, num_samples, sequence_length, options.seed, options.progress);
  Tensor factors{{model.config().num_layers, head_dim}, {}};
  observe_layers(
      model, samples,
      [&](int, const LayerObservation& observation) {
        const auto layer = smooth_factors(observation.span(Side::kKeys), head_dim);
        factors.values.insert(factors.values.end(), layer.begin(), layer.end());
      },
      options.progress);
  return factors;
}

void check_codebook_options(const CodebookOptions& options, int num_layers, int head_dim, const Tensor& smooth_factors) {
  const auto& [num_centroids, num_subspaces, max_iter, seed] = options;
  if (!is_power_of_two(static_cast<std::size_t>(head_dim)))
    throw_invalid("train_codebook", "expected a head_dim that is a power of two, got {}", head_dim);
  if (num_centroids < 2 || num_centroids > 4096 || !is_power_of_two(static_cast<std::size_t>(num_centroids)))
    throw_invalid("train_codebook", "num_centroids: expected a power of two from 2 to 4096, got {}", num_centroids);
  if (num_subspaces < 1 || head_dim % num_subspaces != 0)
    throw_invalid("train_codebook", "num_subspaces: expected a divisor of head_dim {}, got {}", head_dim, num_subspaces);
  check_factors("train_codebook", smooth_factors, {num_layers, head_dim});
  if (max_iter < 1) throw_invalid("train_codebook", "max_iter: expected at least 1, got {}", max_iter);
}

Tensor train_layer_codebook(std::span<const float> keys, std::span<const float> factors, const CodebookOptions& options,
                            int layer) {
  std::vector<float> transformed(keys.begin(), keys.end());
  transform_keys(transformed, factors);
  return train_product_codebook(transformed, static_cast<int>(factors.size()), options.num_subspaces,
                                {.num_centroids = options.num_centroids,
                                 .max_iter = options.max_iter,
                                 .seed = Random(options.seed, static_cast<std::uint64_t>(layer)).next()});
}

Tensor train_codebook(const LanguageModel& model, const TextEncoder& tokenizer, const Tensor& factors, int num_samples,
                      int num_centroids, int num_subspaces, int sequence_length, int max_iter, const CalibrationOptions& options) {
  const int head_dim = model.config().head_dim, num_layers = model.config().num_layers;
  const CodebookOptions wanted{num_centroids, num_subspaces, max_iter, options.seed};
  check_codebook_options(wanted, num_layers, head_dim, factors);
  const auto samples =
      calibration_samples(model, tokenizer, options.texts, num_samples, sequence_length, options.seed, options.progress);
  Tensor codebook{{num_layers, num_subspaces, num_centroids, head_dim / num_subspaces}, {}};
  observe_layers(
      model, samples,
      [&](int layer, const LayerObservation& observation) {
        const auto width = static_cast<std::size_t>(head_dim);
        const Tensor trained =
            train_layer_codebook(observation.span(Side::kKeys),
                                 std::span(factors.values).subspan(static_cast<std::size_t>(layer) * width, width), wanted, layer);
        codebook.values.insert(codebook.values.end(), trained.values.begin(), trained.values.end());
      },
      options.progress);
  return codebook;
}

Tensor walsh_hadamard_matrix(int d) {
  return {{d, d}, veloxquant::walsh_hadamard_matrix(static_cast<std::size_t>(std::max(d, 0)))};
}

Tensor apply_dual_transform_keys(const Tensor& keys, const Tensor& factors) {
  check_layer_factors("apply_dual_transform_keys", factors);
  check_rows("apply_dual_transform_keys", "keys", keys, factors.shape[0]);
  Tensor result = keys;
  transform_keys(result.values, factors.values);
  return result;
}

Tensor apply_dual_transform_queries(const Tensor& queries, const Tensor& factors) {
  check_layer_factors("apply_dual_transform_queries", factors);
  check_rows("apply_dual_transform_queries", "queries", queries, factors.shape[0]);
  Tensor result = queries;
  transform_queries(result.values, factors.values);
  return result;
}

Codes quantize_vq(const Tensor& vectors, const Tensor& codebook_tensor) {
  const ProductCodebook codebook(codebook_tensor);
  check_rows("quantize_vq", "vectors", vectors, codebook.dim());
  Codes codes{with_last(vectors.shape, {codebook.num_subspaces()}), {}, {}};
  codes.words.resize(vectors.values.size() / static_cast<std::size_t>(codebook.dim()) *
                     static_cast<std::size_t>(codebook.num_subspaces()));
  codebook.encode(vectors.values, codes.words);
  if (codebook.num_centroids() <= 256) {
    codes.bytes.assign(codes.words.begin(), codes.words.end());
    codes.words.clear();
  }
  return codes;
}

Tensor dequantize_vq(const Codes& codes, const Tensor& codebook_tensor) {
  const ProductCodebook codebook(codebook_tensor);
  std::vector<std::uint16_t> words = codes.words;
  if (words.empty()) words.assign(codes.bytes.begin(), codes.bytes.end());
  if (codes.shape.empty() || codes.shape.back() != codebook.num_subspaces() || !is_whole(codes.shape, words.size()))
    throw_invalid("dequantize_vq", "codes: expected a shape [.., {}], got [{}]", codebook.num_subspaces(),
                  fmt::join(codes.shape, ", "));
  for (const auto word : words)
    if (word >= codebook.num_centroids())
      throw_invalid("dequantize_vq", "codes: expected values below {}, got {}", codebook.num_centroids(), word);
  Tensor vectors{with_last(codes.shape, {codebook.dim()}), {}};
  vectors.values.resize(words.size() / static_cast<std::size_t>(codebook.num_subspaces()) *
                        static_cast<std::size_t>(codebook.dim()));
  codebook.decode(words, vectors.values);
  return vectors;
}

Tensor compute_query_lut(const Tensor& queries, const Tensor& codebook_tensor) {
  const ProductCodebook codebook(codebook_tensor);
  check_rows("compute_query_lut", "queries", queries, codebook.dim());
  Tensor tables{with_last(queries.shape, {codebook.num_subspaces(), codebook.num_centroids()}), {}};
  tables.values.resize(queries.values.size() / static_cast<std::size_t>(codebook.dim()) *
                       static_cast<std::size_t>(codebook.num_subspaces()) * static_cast<std::size_t>(codebook.num_centroids()));
  codebook.query_tables(queries.values, tables.values);
  return tables;
}

}  // namespace veloxquant::allocators::vecinfer
