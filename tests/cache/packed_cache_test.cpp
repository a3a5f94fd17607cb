#include "veloxquant/cache/packed_cache.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "mlx/ops.h"
#include "tests/cache/packed_inputs.h"
#include "veloxquant/cache/restoring_cache.h"
#include "veloxquant/model/array_entry.h"

namespace veloxquant {
namespace {

using namespace testing;

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

TEST(PackedCache, AttendsAsTheRestoringCacheDoes) {
  for (const int dim : {64, 32}) {
    const Sequence x(2, kTokens, dim);
    for (const auto& exact : {ExactTokens{0, 0}, ExactTokens{32, 4}, ExactTokens{0, 4}, ExactTokens{32, 0}, ExactTokens{300, 50}}) {
      SCOPED_TRACE(::testing::Message() << "dim " << dim << " window " << exact.window << " sinks " << exact.sinks);
      for (const Rotation rotation : {Rotation::kFull, Rotation::kPlane})
        EXPECT_LT(largest_difference(x, rotated(x, dim, rotation, 0), exact, kChunks), kWholeRounding);
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
    EXPECT_LT(largest_difference(x, stored, {0, 0}, kChunks), kWholeRounding);
  }
}

TEST(PackedCache, KnowsSoftCapsAndSlidingWindows) {
  const Sequence x(1, kTokens, 64);
  const auto stored = rotated(x, 64, Rotation::kPlane, 0);
  AttentionSpec spec;
  spec.soft_cap = 2.0f;
  spec.sliding_window = 100;
  EXPECT_LT(largest_difference(x, stored, {32, 4}, kChunks, spec), kWholeRounding);
}

TEST(PackedCache, KnowsRopesThatTurnAPartOrLengthen) {
  const Sequence x(1, kTokens, 64);
  const auto stored = rotated(x, 64, Rotation::kFull, 0);
  for (const int dims : {0, 16, 64}) {
    RopeConfig rope;
    rope.dims = dims;
    rope.magnitude = 1.3;
    EXPECT_LT(largest_difference(x, stored, {32, 4}, kChunks, {}, rope), kWholeRounding) << dims;
  }
  // Planes that do not turn, or are longer than they were.
  for (const int dims : {0, 64}) {
    RopeConfig rope;
    rope.dims = dims;
    rope.magnitude = 1.3;
    EXPECT_LT(largest_difference(x, rotated(x, 64, Rotation::kPlane, 0), {32, 4}, kChunks, {}, rope), kWholeRounding) << dims;
  }
}

// Head sizes, query heads of a KV head and widths as models and plans have them, also past the tokens from which on full keys are
// sums of tables.
TEST(PackedCache, ServesEveryShape) {
  struct Shape {
    int dim, group, key_codes, value_codes;
  };
  for (const Shape& shape :
       {Shape{64, 3, 2, 64}, {64, 16, 17, 5}, {80, 1, 20, 33}, {96, 7, 24, 3}, {128, 6, 64, 4}, {256, 4, 40, 31}}) {
    const auto [dim, group, key_codes, value_codes] = shape;
    constexpr int kMany = 2350;
    const auto q = random_array({1, group, kMany, dim}, 1), k = random_array({1, 1, kMany, dim}, 2),
               v = random_array({1, 1, kMany, dim}, 3);
    for (const Rotation rotation : {Rotation::kFull, Rotation::kPlane}) {
      SCOPED_TRACE(::testing::Message() << "dim " << dim << " group " << group
                                        << (rotation == Rotation::kPlane ? " plane" : " full"));
      const auto fit = [&](const mx::array& x, Side side, Rotation of_side, int codes) {
        const RotatedPqFitter fitter({x.data<float>(), std::size_t{600} * static_cast<std::size_t>(dim)}, dim, {}, of_side);
        return fitter.fit(side, {.codes = codes, .stages = 2, .patches = 2, .max_iter = 1});
      };
      const int most = rotation == Rotation::kPlane ? dim / 2 : dim;
      const auto keys = fit(k, Side::kKeys, rotation, std::min(key_codes, most)),
                 values = fit(v, Side::kValues, Rotation::kFull, value_codes);
      const Rope rope(RopeConfig{}, dim);
      const AttentionSpec spec{.scale = 1 / std::sqrt(static_cast<float>(dim)), .rope = &rope};
      RestoringCache restoring(make_restore({keys}), make_restore({values}), {0, 0});
      PackedCache packed(std::make_shared<PackedLayer>(std::vector{keys}, std::vector{values}, 0, 0));
      int begin = 0;
      for (const int end : {300, kMany - 1, kMany}) {
        const auto some = [&](const mx::array& y) { return cut(y, begin, end); };
        const auto expected = restoring.attend(some(q), some(k), some(v), spec),
                   got = packed.attend(some(q), some(k), some(v), spec);
        if (end != kMany - 1) {
          EXPECT_LT(mx::max(mx::abs(mx::subtract(expected, got))).item<float>() / mx::max(mx::abs(expected)).item<float>(),
                    kWholeRounding);
        }
        begin = end;
      }
    }
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

// A step that does not begin where the last one ended: nothing is left of what is stored, and every later step says so.
TEST(PackedCache, AFailedStepIsKnown) {
  const Sequence x(1, 8, 64);
  const auto stored = rotated(Sequence(1, 300, 64), 64, Rotation::kFull, 0);
  const Rope rope({}, 64);
  const AttentionSpec spec{.rope = &rope};
  const PackedLayer layer(stored.keys, stored.values, 4, 0);
  std::vector<PackedSequence> sequences(1);
  const auto step = [&](std::size_t first) {
    auto out = array_of_zeros({1, 8, x.q.shape(1), 64}, mx::float32);
    packed_step(layer, {{.first = first, .coded_before = 0, .skipped = 0, .tokens = 8, .coded = 4}}, spec, x.q, x.k, x.v, sequences,
                out);
  };
  step(0);
  EXPECT_EQ(sequences.at(0).tokens, 8u);
  const auto missing = ::testing::ThrowsMessage<std::logic_error>(::testing::HasSubstr("a call before this one failed"));
  EXPECT_THAT([&] { step(16); }, missing);  // eight tokens between are lost
  EXPECT_TRUE(sequences.empty());
  EXPECT_THAT([&] { step(8); }, missing);
}

TEST(PackedCache, RefusesWhatItCannotStore) {
  const Sequence x(1, 64, 64);
  const auto kivi = of_method(x, 64, "kivi", 2);
  EXPECT_THAT([&] { PackedLayer(kivi.keys, kivi.values, 0, 0); },
              ::testing::ThrowsMessage<std::invalid_argument>(::testing::HasSubstr("kivi groups 32 tokens")));
}

}  // namespace
}  // namespace veloxquant
