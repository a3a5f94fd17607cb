// K-means, for codebooks.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "veloxquant/core/tensor.h"

namespace veloxquant {

struct KMeansOptions {
  int num_centroids = 256;  // 1 to 65,536
  int max_iter = 100;       // of Lloyd's algorithm; it stops earlier when the error falls by less than a 10,000th
  std::uint64_t seed = 0;
};

struct KMeansResult {
  std::vector<float> centroids;  // [num_centroids, dim]
  int used_centroids = 0;  // cells that hold points, by exact distances; fewer than num_centroids only if there are fewer distinct
                           // points.  Unused centroids repeat a used one
  int iterations = 0;
  double mean_squared_error = 0;  // of a point, summed over its dimensions; weighted where there are weights
};

/// Lloyd's algorithm from k-means++ seeds (Arthur and Vassilvitskii 2007, on a subsample), for points: `rows` rows of `dim` floats,
/// `stride` apart.  A cell that runs empty is moved to the point that has most error.  The same result on any number of threads.
/// weights [rows] or none: what a point counts, ≥ 0.
/// Throws std::invalid_argument for fewer points than centroids, values that are not finite, weights that are negative or all zero,
/// and counts below 1.
KMeansResult kmeans(const float* points, std::size_t rows, std::size_t stride, std::size_t dim, const KMeansOptions& options,
                    std::span<const float> weights = {});

/// One codebook per sub-space: vectors [rows, dim] in num_subspaces pieces of dim / num_subspaces neighbouring channels →
/// [num_subspaces, num_centroids, dim / num_subspaces].  Sub-spaces are trained in parallel.  Warns where a sub-space has fewer
/// distinct points than centroids.
/// Throws std::invalid_argument unless num_subspaces divides dim, and as kmeans does.
Tensor train_product_codebook(std::span<const float> vectors, int dim, int num_subspaces, const KMeansOptions& options);

}  // namespace veloxquant
