// Method "vecinfer" (arXiv 2510.06175): product quantisation, of keys after a smoothing and rotating dual transform.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "veloxquant/kernels/nearest_centroid.h"
#include "veloxquant/quantize/registry.h"

namespace veloxquant {

/// λᵢ = √max|xᵢ| over rows of vectors [rows, dim] → [dim]; 1 for a channel that is zero everywhere.
std::vector<float> smooth_factors(std::span<const float> vectors, int dim);

/// Rows of vectors [rows, dim] in place to (k ⊘ λ)·H.  dim is a power of two.
void transform_keys(std::span<float> vectors, std::span<const float> smooth_factors);

/// Rows of vectors [rows, dim] in place to (q ⊙ λ)·H, which keeps q·k.
void transform_queries(std::span<float> vectors, std::span<const float> smooth_factors);

/// Rows in place from (k ⊘ λ)·H to k.
void restore_keys(std::span<float> vectors, std::span<const float> smooth_factors);

/// A codebook [num_subspaces, num_centroids, subspace_dim] ready for use.
class ProductCodebook {
 public:
  /// Throws std::invalid_argument unless the codebook has three axes, 1 to 65,536 centroids, and finite values.
  explicit ProductCodebook(Tensor codebook);

  int num_subspaces() const { return num_subspaces_; }
  int num_centroids() const { return num_centroids_; }
  int dim() const { return num_subspaces_ * subspace_dim_; }
  std::span<const float> entries() const { return codebook_.values; }

  /// vectors [rows, dim] → codes [rows, num_subspaces].
  void encode(std::span<const float> vectors, std::span<std::uint16_t> codes) const;

  /// codes [rows, num_subspaces] → vectors [rows, dim].
  void decode(std::span<const std::uint16_t> codes, std::span<float> vectors) const;

  /// queries [rows, dim] → inner products with all centroids, tables [rows, num_subspaces, num_centroids].
  void query_tables(std::span<const float> queries, std::span<float> tables) const;

 private:
  Tensor codebook_;
  int num_subspaces_, num_centroids_, subspace_dim_;
  std::vector<NearestCentroid> nearest_;
};

/// Keys: dual transform, then product quantisation.  Values: product quantisation alone.
/// Encoded token: codes of log₂ num_centroids bits, packed.
class VecInferQuantizer : public Quantizer {
 public:
  /// smooth_factors [dim], positive, for keys; empty for values.
  VecInferQuantizer(std::vector<float> smooth_factors, Tensor codebook);

  int dim() const override { return codebook_.dim(); }
  const ProductCodebook& codebook() const { return codebook_; }
  std::span<const float> smooth_factors() const { return smooth_factors_; }
  std::size_t encoded_bytes(std::size_t tokens) const override;
  void encode(std::span<const float> vectors, std::span<std::uint8_t> encoded) const override;
  void decode(std::span<const std::uint8_t> encoded, std::span<float> vectors) const override;

 private:
  std::vector<float> smooth_factors_;
  ProductCodebook codebook_;
  int code_bits_;
};

/// The row of quantizer_methods(): 256 centroids and dim · width / 8 sub-spaces; widths those for which that divides dim.
QuantizerMethod vecinfer_method();

/// What a plan stores of a trained unit; smooth_factors is empty for values.
QuantizerParameters vecinfer_parameters(Side side, int dim, std::vector<float> smooth_factors, Tensor codebook);

}  // namespace veloxquant
