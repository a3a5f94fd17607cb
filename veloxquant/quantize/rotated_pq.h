// Method "rotated_pq": product quantisation in a basis in which errors cost alike.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "veloxquant/quantize/additive_codebook.h"
#include "veloxquant/quantize/byte_tables.h"
#include "veloxquant/quantize/linear_algebra.h"
#include "veloxquant/quantize/packed_layout.h"
#include "veloxquant/quantize/registry.h"

namespace veloxquant {

/// What errors of the vectors of a unit cost (adjoint prediction, docs/design.md): G = E[g gᵀ] over the gradients g of the
/// vectors, and how much each vector counts, gG⁻¹gᵀ.
struct ErrorMetric {
  SquareMatrix matrix;         // [dim, dim]; empty: the identity
  std::vector<float> weights;  // [rows], ≥ 0; empty: all 1
};

/// G as errors are measured by it: on the scale of a mean diagonal of 1, with 1 % of that added; the identity for a G of zeros, or
/// an empty one.
SquareMatrix ridged_metric(SquareMatrix metric, std::size_t dim);

/// How sub-spaces may mix dimensions.
enum class Rotation {
  kFull,   // any with any
  kPlane,  // whole RoPE planes only, dimensions i and i + dim/2: pieces can be turned by RoPE as they are decoded
};

struct RotatedPqOptions {
  int codes = 16;    // of 8 bits, a vector: 1 to dim, with Rotation::kPlane to dim / 2
  int stages = 2;    // codes of a sub-space; an odd code has one of its own
  int patches = 0;   // vectors of each 256 whose residual is stored as well: 0 to 64
  int max_iter = 8;  // of K-means
  std::uint64_t seed = 0;
};

/// Stages that so many training rows can fill: fewer than 8192 would learn pairs of tables by heart.
int stages_for(std::size_t rows);

/// Fits rotated_pq to vectors, at several numbers of codes.
///
/// Row vectors: z = (x − μ)·A is cut into sub-spaces of 8-bit codes.  A = G^½·U·P: G the metric with 1 % of its mean diagonal
/// added, U the eigenvectors of the data's covariance in that metric, P a permutation that evens out the product of variances over
/// the sub-spaces (OPQ, parametric: Ge et al. 2013).  Mean, covariance and K-means are weighted.  Rotation::kPlane: A has a block
/// G^½ of its own for each sub-space.
class RotatedPqFitter {
 public:
  /// vectors [rows, dim] must outlive this.  Throws std::invalid_argument for values that are not finite, a metric or weights of
  /// other sizes, and kPlane with an odd dim.
  RotatedPqFitter(std::span<const float> vectors, int dim, ErrorMetric metric, Rotation rotation);

  /// With fewer vectors than 256 as many centroids as vectors.  Throws std::invalid_argument for options out of range.
  QuantizerParameters fit(Side side, const RotatedPqOptions& options) const;

 private:
  std::span<const float> vectors_;
  std::size_t dim_;
  Rotation rotation_;
  std::vector<float> weights_;
  SquareMatrix metric_, covariance_;
  std::vector<double> mean_;
  SquareMatrix whitening_;         // kFull: G^½·U, columns by ascending variance
  std::vector<double> variances_;  // kFull: of those columns
};

/// Entries are bytes (byte_tables.h), in the space in which attention looks them up: of z with Rotation::kFull; of the vectors
/// themselves, μ in the first stage, with kPlane, where a sub-space is a few planes.  Whatever encodes, restores or attends uses
/// these entries: sums of them in z are exact to the rounding of float32.
///
/// Encoded: in blocks of 256 tokens, the codes [tokens, codes] of one byte, then the patches of those `patches` vectors of the
/// block that lost most by the metric: place in the block (1 byte), scale (half), and 4-bit residuals in the metric's basis.  A
/// block that still grows has as many, so that it can be encoded as tokens come: a vector that loses more than one of those patched
/// takes its place, and no original is needed again.
class RotatedPqQuantizer : public Quantizer {
 public:
  static constexpr std::size_t kBlockTokens = kPackedBlockTokens;
  static constexpr int kBeam = static_cast<int>(AdditiveCodebook::kBeam);
  static constexpr float kPatchCentre = 7.5f;  // of patch codes 0 … 15

  /// Patches of a block of so many tokens, where `patches` are those of a whole one.
  static constexpr std::size_t patches_of(std::size_t patches, std::size_t tokens) { return std::min(patches, tokens); }

  explicit RotatedPqQuantizer(const QuantizerParameters& parameters);

  int dim() const override { return static_cast<int>(dim_); }
  int token_group() const override { return patches_ > 0 ? static_cast<int>(kBlockTokens) : 1; }

  // For other implementations of the same: patches of each 256 tokens, μ [dim], A and A⁻¹ [dim, dim], sub-spaces in the order of
  // the columns of A.
  int patches() const { return static_cast<int>(patches_); }
  const std::vector<float>& mean() const { return mean_; }
  const std::vector<float>& transform() const { return transform_; }
  const std::vector<float>& inverse() const { return inverse_; }
  const std::vector<AdditiveCodebook>& subspaces() const { return subspaces_; }

  /// The entries of each sub-space as they are stored.
  const std::vector<ByteTables>& byte_tables() const { return byte_tables_; }

  /// kPlane: of each sub-space its planes i, ascending; its columns of byte_tables() are the dimensions i and i + dim/2 of each.
  /// Otherwise none, and its columns are those of z.
  const std::vector<std::vector<std::size_t>>& planes() const { return planes_; }

  std::size_t encoded_bytes(std::size_t tokens) const override;
  void encode(std::span<const float> vectors, std::span<std::uint8_t> encoded) const override;
  void decode(std::span<const std::uint8_t> encoded, std::span<float> vectors) const override;

  // The same in parts, for caches that lay codes out in their own way.

  /// vectors [tokens, dim] → codes [tokens, codes], and what these leave of the rotated vectors, [tokens, dim], unless `rest` is
  /// empty.
  void encode_codes(std::span<const float> vectors, std::span<std::uint8_t> codes, std::span<float> rest) const;

  /// Rotated vectors z [tokens, dim] → codes [tokens, codes].
  void choose_codes(std::span<const float> z, std::span<std::uint16_t> codes) const;

  /// One patch, patch_bytes(dim) bytes: the rest [dim] of the token at `place` of its block.
  void write_patch(std::span<const float> rest, std::size_t place, std::uint8_t* bytes) const;
  static std::size_t patch_bytes(std::size_t dim);

  /// By which vectors with patches are chosen: the square of the rest.
  static float patch_error(std::span<const float> rest);

  /// Adds the rest in a patch to a rotated vector [dim].
  static void add_patch(const std::uint8_t* bytes, std::span<float> z);

 private:
  void look_up(const std::uint8_t* codes, std::size_t tokens, float* z) const;
  void write_patches(std::span<const float> rest, std::uint8_t* bytes) const;
  void add_patches(const std::uint8_t* bytes, std::size_t tokens, float* z) const;

  std::size_t dim_, codes_, patches_;
  std::vector<float> mean_, transform_, inverse_;  // [dim], [dim, dim]
  std::vector<AdditiveCodebook> subspaces_;
  std::vector<ByteTables> byte_tables_;
  std::vector<std::vector<std::size_t>> planes_;
};

/// Parameters as plans up to format 3 have them, with a `codebook` [stages, num_centroids, dim] of float32 in z, to what
/// RotatedPqQuantizer takes: rounded as fitting rounds, columns of each sub-space mixed first with Rotation::kFull, which changes
/// nothing but what rounding costs.  Throws std::invalid_argument as making it does.
QuantizerParameters with_byte_tables(QuantizerParameters parameters);

/// Bytes that `tokens` vectors take with that many codes and patches.
std::size_t rotated_pq_bytes(int dim, int codes, int patches, std::size_t tokens);

/// The row of quantizer_methods(): fits without a metric.
QuantizerMethod rotated_pq_method();

}  // namespace veloxquant
