#include "veloxquant/cache/packed_cache.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <thread>

#include "mlx/ops.h"
#include "mlx/random.h"
#include "mlx/transforms.h"
#include "veloxquant/cache/restoring_cache.h"
#include "veloxquant/quantize/kmeans.h"
#include "veloxquant/quantize/rotated_pq.h"
#include "veloxquant/quantize/vecinfer.h"

namespace veloxquant {
namespace {

constexpr int kHeads = 2, kQueryHeads = 4;

mx::array random_array(const mx::Shape& shape, std::uint64_t seed) {
  const auto x = mx::random::normal(shape, mx::float32, mx::random::key(seed));
  mx::eval(x);
  return x;
}

mx::array cut(const mx::array& x, int begin, int end) {
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
Stored rotated(const Sequence& x, int dim, Rotation rotation, int patches) {
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

Stored of_method(const Sequence& x, int dim, const char* method, double width) {
  Stored stored;
  for (const Side side : {Side::kKeys, Side::kValues}) {
    const auto& vectors = side == Side::kKeys ? x.k : x.v;
    (side == Side::kKeys ? stored.keys : stored.values)
        .push_back(quantizer_method(method).fit({vectors.data<float>(), vectors.size()}, dim, {.side = side, .width = width}));
  }
  return stored;
}

// vecinfer with other numbers of centroids than calibration gives.
Stored product_codes(const Sequence& x, int dim, int subspaces, int centroids) {
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

// The largest difference of what both caches give, relative to the largest value, over all chunks.
double largest_difference(const Sequence& x, const Stored& stored, ExactTokens exact, const std::vector<int>& chunks,
                          AttentionSpec spec = {}, const RopeConfig& rope_config = {}) {
  const Rope rope(rope_config, x.k.shape(3));
  spec.rope = &rope;
  spec.scale = 0.3f;
  RestoringCache restoring(make_restore(stored.optional(Side::kKeys)), make_restore(stored.optional(Side::kValues)), exact);
  PackedCache packed(std::make_shared<PackedLayer>(stored.keys, stored.values, exact.window, exact.sinks));
  double difference = 0;
  int begin = 0;
  for (const int size : chunks) {
    const int end = begin + size;
    const auto some = [&](const mx::array& y) { return cut(y, begin, end); };
    const auto expected = restoring.attend(some(x.q), some(x.k), some(x.v), spec),
               got = packed.attend(some(x.q), some(x.k), some(x.v), spec);
    difference = std::max<double>(
        difference, mx::max(mx::abs(mx::subtract(expected, got))).item<float>() / mx::max(mx::abs(expected)).item<float>());
    EXPECT_EQ(got.shape(), expected.shape());
    begin = end;
  }
  EXPECT_EQ(packed.offset(), begin);
  return difference;
}

const std::vector<int> kChunks = {1, 1, 7, 100, 1, 160, 1, 1, 300, 2, 5, 1};  // 580 tokens
constexpr int kTokens = 580;
constexpr double kRounding = 2e-5;
// Where scores are sums of integers: half a step of 2⁻¹⁶, or for 4-bit codes 2⁻¹⁴, of the widest range of a code's products.  Those
// of few tokens with unlike values show it most.
constexpr double kScanRounding = 2e-4, kNibbleScanRounding = 1.5e-3;

TEST(PackedCache, AttendsAsTheRestoringCacheDoes) {
  for (const int dim : {64, 32}) {
    const Sequence x(2, kTokens, dim);
    for (const auto& exact : {ExactTokens{0, 0}, ExactTokens{32, 4}, ExactTokens{0, 4}, ExactTokens{32, 0}, ExactTokens{300, 50}}) {
      SCOPED_TRACE(::testing::Message() << "dim " << dim << " window " << exact.window << " sinks " << exact.sinks);
      for (const Rotation rotation : {Rotation::kFull, Rotation::kPlane})
        EXPECT_LT(largest_difference(x, rotated(x, dim, rotation, 0), exact, kChunks), kRounding);
      EXPECT_LT(largest_difference(x, of_method(x, dim, "affine", 3), exact, kChunks), kRounding);
      EXPECT_LT(largest_difference(x, of_method(x, dim, "vecinfer", 2), exact, kChunks), kScanRounding);
      EXPECT_LT(largest_difference(x, of_method(x, dim, "turboquant", 2), exact, kChunks), kRounding);
    }
  }
}

TEST(PackedCache, ScansCodesOfFourBits) {
  const Sequence x(1, kTokens, 64);
  for (const int subspaces : {1, 16, 64})
    EXPECT_LT(largest_difference(x, product_codes(x, 64, subspaces, 16), {32, 4}, kChunks), kNibbleScanRounding) << subspaces;
  // Neither a byte nor half of one: decoded.
  EXPECT_LT(largest_difference(x, product_codes(x, 64, 16, 32), {32, 4}, kChunks), kRounding);
}

TEST(PackedCache, PatchesAreThoseOfTheQuantizer) {
  const Sequence x(1, kTokens, 64);
  for (const Rotation rotation : {Rotation::kFull, Rotation::kPlane}) {
    // Of other vectors: a centroid that is a vector leaves nothing of it, and a rest of nothing may round to either side.
    const auto stored = rotated(Sequence(1, kTokens, 64, 10), 64, rotation, 5);
    EXPECT_LT(largest_difference(x, stored, {0, 0}, kChunks), kRounding);
  }
}

TEST(PackedCache, KnowsSoftCapsAndSlidingWindows) {
  const Sequence x(1, kTokens, 64);
  const auto stored = rotated(x, 64, Rotation::kPlane, 0);
  AttentionSpec spec;
  spec.soft_cap = 2.0f;
  spec.sliding_window = 100;
  EXPECT_LT(largest_difference(x, stored, {32, 4}, kChunks, spec), kRounding);
}

TEST(PackedCache, KnowsRopesThatTurnAPartOrLengthen) {
  const Sequence x(1, kTokens, 64);
  const auto stored = rotated(x, 64, Rotation::kFull, 0);
  for (const int dims : {0, 16, 64}) {
    RopeConfig rope;
    rope.dims = dims;
    rope.magnitude = 1.3;
    EXPECT_LT(largest_difference(x, stored, {32, 4}, kChunks, {}, rope), kRounding) << dims;
  }
}

TEST(PackedCache, GrowsByBlocksOfCodes) {
  const Sequence x(1, 600, 64);
  const auto stored = rotated(x, 64, Rotation::kFull, 3);
  const Rope rope({}, 64);
  PackedCache cache(std::make_shared<PackedLayer>(stored.keys, stored.values, 32, 4));
  const auto bytes_at = [&](int begin, int end) {
    cache.attend(cut(x.q, begin, end), cut(x.k, begin, end), cut(x.v, begin, end), {.scale = 1.0f, .rope = &rope});
    return cache.nbytes();
  };
  const std::size_t exact = bytes_at(0, 36);
  std::size_t block = 0;
  for (const auto* side : {&stored.keys, &stored.values})
    for (const auto& unit : *side) block += make_quantizer(unit)->encoded_bytes(256);
  EXPECT_EQ(exact, 36 * 2 * 2 * 68);
  EXPECT_EQ(bytes_at(36, 37), exact + block);
  EXPECT_EQ(bytes_at(37, 36 + 256), exact + block);
  EXPECT_EQ(bytes_at(36 + 256, 36 + 257), exact + 2 * block);
}

TEST(PackedCache, RefusesOtherShapes) {
  const Sequence x(1, 8, 64), narrow(1, 8, 32);
  const auto stored = rotated(Sequence(1, 300, 64), 64, Rotation::kFull, 0);
  const Rope rope({}, 64);
  const AttentionSpec spec{.rope = &rope};
  PackedCache cache(std::make_shared<PackedLayer>(stored.keys, stored.values, 4, 0));
  const auto attend = [&](const mx::array& q, const mx::array& k, const mx::array& v) {
    return [=, &cache] { cache.attend(q, k, v, spec); };
  };
  const auto one = [](const mx::array& y) { return mx::slice(y, {0, 0, 0, 0}, {1, 1, 8, y.shape(3)}); };
  EXPECT_THAT(attend(x.q, one(x.k), one(x.v)),
              ::testing::ThrowsMessage<std::invalid_argument>(::testing::HasSubstr("keys of 2 KV heads, got 1")));
  EXPECT_THAT(attend(narrow.q, narrow.k, narrow.v),
              ::testing::ThrowsMessage<std::invalid_argument>(::testing::HasSubstr("64 dimensions, got 32")));
  cache.attend(x.q, x.k, x.v, spec);
  EXPECT_THAT(attend(x.q, x.k, one(x.v)),
              ::testing::ThrowsMessage<std::invalid_argument>(::testing::HasSubstr("got [1, 2, 8, 64] and [1, 1, 8, 64]")));
}

TEST(PackedCache, RefusesWhatItCannotStore) {
  const Sequence x(1, 64, 64);
  const auto kivi = of_method(x, 64, "kivi", 2);
  EXPECT_THAT([&] { PackedLayer(kivi.keys, kivi.values, 0, 0); },
              ::testing::ThrowsMessage<std::invalid_argument>(::testing::HasSubstr("kivi groups 32 tokens")));
}

}  // namespace
}  // namespace veloxquant
