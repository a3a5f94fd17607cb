// Codebooks of one sub-space whose codewords are sums of one entry from each of one or two tables.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "veloxquant/kernels/nearest_centroid.h"

namespace veloxquant {

/// One table is a plain codebook.  With two, a vector is stored as the pair of entries whose sum is near it: 256² codewords for the
/// memory of 2 · 256, and decoding costs no more look-ups a code (residual and additive quantisation: Babenko and Lempitsky 2014).
class AdditiveCodebook {
 public:
  static constexpr int kMaxStages = 2;

  /// Entries of the first of two tables that encode() tries.
  static constexpr std::size_t kBeam = 8;

  struct TrainOptions {
    int stages = 1, num_centroids = 256;
    int max_iter = 8;    // of K-means for each table
    int joint_iter = 3;  // encoding with both tables, then fitting both anew
    std::uint64_t seed = 0;
  };

  /// tables [stages, num_centroids, dim], finite; 1 or 2 stages.
  AdditiveCodebook(std::vector<float> tables, int stages, int num_centroids, int dim);

  /// Fits tables to points: `rows` rows of dim floats, `stride` apart, that count as much as their weights [rows] (none: all 1).
  /// rows ≥ num_centroids.
  static AdditiveCodebook train(const float* points, std::size_t rows, std::size_t stride, int dim, std::span<const float> weights,
                                const TrainOptions& options);

  int stages() const { return stages_; }
  int dim() const { return static_cast<int>(dim_); }
  int num_centroids() const { return static_cast<int>(count_); }

  /// Entry `code` of a table, [dim].
  const float* entry(int stage, std::size_t code) const {
    return tables_.data() + (static_cast<std::size_t>(stage) * count_ + code) * dim_;
  }

  /// Rows `stride` apart → codes[i · code_stride + stage], on the calling thread.  Pairs are sought among the kBeam entries of the
  /// first table that are nearest.
  void encode(const float* points, std::size_t rows, std::size_t stride, std::uint16_t* codes, std::size_t code_stride) const;

 private:
  void prepare();
  void encode_pairs(const float* points, std::size_t rows, std::size_t stride, std::uint16_t* codes, std::size_t code_stride) const;

  std::vector<float> tables_;
  int stages_;
  std::size_t count_, dim_;
  std::vector<NearestCentroid> nearest_;  // of a single table
  std::vector<float> half_norms_;         // [stages, count], of two
  std::vector<float> opposite_;           // [dim, stages, count]: entries by dimension, times −1
  std::vector<float> cross_;              // [count, count]: inner products between the two tables
};

}  // namespace veloxquant
