// VecInfer (arXiv 2510.06175): smooth factors, a dual transform, product quantisation and look-up tables, on keys after RoPE with
// all KV heads of a layer together.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "veloxquant/allocators/ratequant.h"
#include "veloxquant/core/tensor.h"
#include "veloxquant/model/language_model.h"
#include "veloxquant/text/text_encoder.h"

namespace veloxquant::allocators::vecinfer {

/// λᵢ = √max|Kᵢ| over samples, tokens and KV heads, never zero (a dead channel gets 1) → [num_layers, head_dim].
Tensor calibrate_smooth_factors(const LanguageModel& model, const TextEncoder& tokenizer, int num_samples = 64,
                                int sequence_length = 256, const CalibrationOptions& options = {});

/// K-means per sub-space on transformed keys → [num_layers, num_subspaces, num_centroids, head_dim / num_subspaces].
/// smooth_factors [num_layers, head_dim].  Throws std::invalid_argument unless those are finite and above 0, num_centroids is a
/// power of two from 2 to 4096, num_subspaces divides head_dim, head_dim is a power of two, max_iter is at least 1 and there are no
/// fewer keys than centroids.
Tensor train_codebook(const LanguageModel& model, const TextEncoder& tokenizer, const Tensor& smooth_factors, int num_samples = 128,
                      int num_centroids = 256, int num_subspaces = 8, int sequence_length = 256, int max_iter = 100,
                      const CalibrationOptions& options = {});

struct CodebookOptions {
  int num_centroids = 256, num_subspaces = 8, max_iter = 100;
  std::uint64_t seed = 0;
};

/// Throws as train_codebook does for a model of this shape.
void check_codebook_options(const CodebookOptions& options, int num_layers, int head_dim, const Tensor& smooth_factors);

/// What train_codebook does for one layer: keys [.., head_dim] and its smooth factors [head_dim] → [num_subspaces, num_centroids,
/// head_dim / num_subspaces].
Tensor train_layer_codebook(std::span<const float> keys, std::span<const float> smooth_factors, const CodebookOptions& options,
                            int layer);

/// The orthonormal Walsh–Hadamard matrix [d, d], its own transpose and inverse.  Throws std::invalid_argument unless d is a power
/// of two.
Tensor walsh_hadamard_matrix(int d);

/// keys [.., head_dim] → (K ⊘ λ)·H, one layer's smooth_factors [head_dim].
Tensor apply_dual_transform_keys(const Tensor& keys, const Tensor& smooth_factors);

/// queries [.., head_dim] → (q ⊙ λ)·H, so that q'·k' = q·k.
Tensor apply_dual_transform_queries(const Tensor& queries, const Tensor& smooth_factors);

/// Codes of a product quantiser, in the smallest unsigned type that holds them: `bytes` if there are at most 256 centroids, else
/// `words`.
struct Codes {
  std::vector<std::int64_t> shape;  // [.., num_subspaces]
  std::vector<std::uint8_t> bytes;
  std::vector<std::uint16_t> words;
};

/// vectors [.., head_dim], one layer's codebook [num_subspaces, num_centroids, subspace_dim] → the nearest centroid of each piece.
Codes quantize_vq(const Tensor& vectors, const Tensor& codebook);

/// The centroids that the codes name → [.., head_dim].  Throws std::invalid_argument for a code without a centroid.
Tensor dequantize_vq(const Codes& codes, const Tensor& codebook);

/// queries [.., head_dim] → [.., num_subspaces, num_centroids], inner products whose sum over the codes of a key is its score.
Tensor compute_query_lut(const Tensor& queries, const Tensor& codebook);

}  // namespace veloxquant::allocators::vecinfer
