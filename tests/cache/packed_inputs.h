// What tests of packed caches feed them.
#pragma once

#include <optional>
#include <vector>

#include "mlx/ops.h"
#include "mlx/random.h"
#include "mlx/transforms.h"
#include "veloxquant/model/device.h"
#include "veloxquant/quantize/kmeans.h"
#include "veloxquant/quantize/rotated_pq.h"
#include "veloxquant/quantize/vecinfer.h"

namespace veloxquant::testing {

inline constexpr int kHeads = 2, kQueryHeads = 4;

inline mx::array random_array(const mx::Shape& shape, std::uint64_t seed) {
  const auto x = mx::random::normal(shape, mx::float32, mx::random::key(seed));
  mx::eval(x);
  return x;
}

inline mx::array cut(const mx::array& x, int begin, int end) {
  return mx::slice(x, {0, 0, begin, 0}, {x.shape(0), x.shape(1), end, x.shape(3)});
}

struct Sequence {
  mx::array q, k, v;

  Sequence(int batch, int tokens, int dim, std::uint64_t seed = 0)
      : q(random_array({batch, kQueryHeads, tokens, dim}, seed + 1)),
        k(random_array({batch, kHeads, tokens, dim}, seed + 2)),
        v(random_array({batch, kHeads, tokens, dim}, seed + 3)) {}
};

struct Stored {
  std::vector<QuantizerParameters> keys, values;  // of each head

  std::vector<std::optional<QuantizerParameters>> optional(Side side) const {
    const auto& units = side == Side::kKeys ? keys : values;
    return {units.begin(), units.end()};
  }
};

// Heads of different widths.
inline Stored rotated(const Sequence& x, int dim, Rotation rotation, int patches) {
  Stored stored;
  for (int head = 0; head < kHeads; ++head)
    for (const Side side : {Side::kKeys, Side::kValues}) {
      const auto& vectors = side == Side::kKeys ? x.k : x.v;
      const RotatedPqFitter fitter({vectors.data<float>(), vectors.size()}, dim, {},
                                   side == Side::kKeys ? rotation : Rotation::kFull);
      (side == Side::kKeys ? stored.keys : stored.values)
          .push_back(fitter.fit(side, {.codes = 9 + 5 * head, .stages = 2, .patches = patches, .max_iter = 2}));
    }
  return stored;
}

inline Stored of_method(const Sequence& x, int dim, const char* method, double width) {
  Stored stored;
  for (const Side side : {Side::kKeys, Side::kValues}) {
    const auto& vectors = side == Side::kKeys ? x.k : x.v;
    (side == Side::kKeys ? stored.keys : stored.values)
        .push_back(quantizer_method(method).fit({vectors.data<float>(), vectors.size()}, dim, {.side = side, .width = width}));
  }
  return stored;
}

// vecinfer with other numbers of centroids than calibration gives.
inline Stored product_codes(const Sequence& x, int dim, int subspaces, int centroids) {
  Stored stored;
  for (const Side side : {Side::kKeys, Side::kValues}) {
    const auto& vectors = side == Side::kKeys ? x.k : x.v;
    std::vector<float> rows(vectors.data<float>(), vectors.data<float>() + vectors.size()), factors;
    if (side == Side::kKeys) {
      factors = smooth_factors(rows, dim);
      transform_keys(rows, factors);
    }
    (side == Side::kKeys ? stored.keys : stored.values)
        .push_back(vecinfer_parameters(side, dim, factors,
                                       train_product_codebook(rows, dim, subspaces, {.num_centroids = centroids, .max_iter = 2})));
  }
  return stored;
}

inline const std::vector<int> kChunks = {1, 1, 7, 100, 1, 160, 1, 1, 300, 2, 5, 1};  // 580 tokens
inline constexpr int kTokens = 580;

inline constexpr double kRounding = 2e-5;  // of sums in another order, relative to the largest value

// Where few queries attend to rotated_pq on the CPU: keys are whole numbers of 12 to 15 bits, and queries of about 11.
inline constexpr double kWholeRounding = 5e-3;

// Where scores are sums of integers: half a step of 2⁻¹⁶, or for 4-bit codes 2⁻¹⁴, of the widest range of a code's products.  Those
// of few tokens with unlike values show it most.
inline constexpr double kScanRounding = 2e-4, kNibbleScanRounding = 1.5e-3;

}  // namespace veloxquant::testing
