#include "veloxquant/cache/packed_arrays.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "tests/cache/packed_inputs.h"
#include "tests/model/demo_model.h"
#include "veloxquant/cache/packed_cache.h"
#include "veloxquant/calibrate/make_plan.h"
#include "veloxquant/model/cpu_operation.h"

namespace veloxquant {
namespace {

using namespace testing;

struct Exact {
  int window, sinks;
};

struct Difference {
  float mean, largest;  // relative to the largest value
};

std::unique_ptr<PackedArrays> arrays_of(const Stored& stored, Exact exact) {
  return std::make_unique<PackedArrays>(std::make_shared<PackedArraysLayer>(stored.keys, stored.values, exact.window, exact.sinks));
}

// Of what the cache of our own code gives and this one, over all chunks.
Difference compare(const Sequence& x, const Stored& stored, Exact exact, const std::vector<int>& chunks, AttentionSpec spec = {},
                   const RopeConfig& rope_config = {}) {
  const Rope rope(rope_config, x.k.shape(3));
  spec.rope = &rope;
  spec.scale = 0.3f;
  PackedCache packed(std::make_shared<PackedLayer>(stored.keys, stored.values, exact.window, exact.sinks));
  const auto arrays = arrays_of(stored, exact);
  Difference result{0, 0};
  int begin = 0;
  for (const int size : chunks) {
    const auto some = [&](const mx::array& y) { return cut(y, begin, begin + size); };
    const auto expected = packed.attend(some(x.q), some(x.k), some(x.v), spec),
               got = arrays->attend(some(x.q), some(x.k), some(x.v), spec);
    EXPECT_EQ(got.shape(), expected.shape());
    const auto error = mx::divide(mx::abs(mx::subtract(expected, got)), mx::max(mx::abs(expected)));
    result.mean = std::max(result.mean, mx::mean(error).item<float>());
    result.largest = std::max(result.largest, mx::max(error).item<float>());
    begin += size;
  }
  EXPECT_EQ(arrays->offset(), begin);
  return result;
}

// A vector within rounding of a boundary may get another code, which those that see much of it show.  turboquant has a boundary at
// zero, where sums of 8-bit values often are.
constexpr Difference kOtherCodes = {1e-3f, 0.15f};

void expect_alike(Difference difference, Difference most = {0.1f * kWholeRounding, kWholeRounding}) {
  EXPECT_LT(difference.mean, most.mean);
  EXPECT_LT(difference.largest, most.largest);
}

// Of other vectors: what a centroid that is a vector leaves of it is rounding, and patches of that are noise.
Stored patched(int dim, Rotation rotation, int patches) {
  return rotated(Sequence(1, 400, dim, 10), dim, rotation, patches);
}

TEST(PackedArrays, AttendsAsThePackedCacheDoes) {
  const int dim = 64;
  const Sequence x(2, kTokens, dim);
  const auto plain = patched(dim, Rotation::kPlane, 0), with_patches = patched(dim, Rotation::kPlane, 5),
             affine = of_method(x, dim, "affine", 3), vecinfer = of_method(x, dim, "vecinfer", 2),
             turboquant = of_method(x, dim, "turboquant", 2);
  for (const auto& exact : {Exact{0, 0}, Exact{32, 4}, Exact{0, 4}, Exact{32, 0}, Exact{300, 50}}) {
    SCOPED_TRACE(::testing::Message() << "window " << exact.window << " sinks " << exact.sinks);
    for (const auto* stored : {&plain, &with_patches, &affine}) expect_alike(compare(x, *stored, exact, kChunks));
    expect_alike(compare(x, vecinfer, exact, kChunks), {kScanRounding, kScanRounding});
    expect_alike(compare(x, turboquant, exact, kChunks), kOtherCodes);
  }
}

TEST(PackedArrays, OtherHeadDimensions) {
  for (const int dim : {80, 128}) {
    SCOPED_TRACE(dim);
    const Sequence x(1, kTokens, dim);
    expect_alike(compare(x, patched(dim, Rotation::kFull, 3), {32, 4}, kChunks));
    expect_alike(compare(x, of_method(x, dim, "affine", 2), {32, 4}, kChunks));
    expect_alike(compare(x, of_method(x, dim, "turboquant", 3), {32, 4}, kChunks), kOtherCodes);
  }
}

TEST(PackedArrays, PatchesOfOneSide) {
  const Sequence x(1, kTokens, 64);
  for (const bool of_keys : {false, true}) {
    auto stored = patched(64, Rotation::kFull, 3);
    for (auto& unit : of_keys ? stored.values : stored.keys) unit.numbers["patches"] = 0;
    expect_alike(compare(x, stored, {32, 4}, kChunks));
  }
}

TEST(PackedArrays, OneByOne) {
  const Sequence x(1, 330, 64);
  expect_alike(compare(x, patched(64, Rotation::kPlane, 5), {32, 4}, std::vector<int>(330, 1)));
}

// More than is read or asked at a time.
TEST(PackedArrays, LongTexts) {
  const Sequence x(1, 2900, 32);
  const auto stored = of_method(x, 32, "affine", 2);
  expect_alike(compare(x, stored, {32, 4}, {2899, 1}));
  expect_alike(compare(x, stored, {32, 4}, {300, 2000, 598, 1, 1}));
}

TEST(PackedArrays, KnowsSoftCapsAndSlidingWindows) {
  const Sequence x(1, kTokens, 64);
  AttentionSpec spec;
  spec.soft_cap = 2.0f;
  spec.sliding_window = 100;
  expect_alike(compare(x, patched(64, Rotation::kPlane, 0), {32, 4}, kChunks, spec));
  spec.sliding_window = 20;
  expect_alike(compare(x, patched(64, Rotation::kPlane, 0), {32, 4}, kChunks, spec));
}

TEST(PackedArrays, KnowsRopesThatTurnAPartOrLengthen) {
  const Sequence x(1, kTokens, 64);
  const auto stored = patched(64, Rotation::kFull, 0);
  for (const int dims : {0, 16, 64}) {
    RopeConfig rope;
    rope.dims = dims;
    rope.magnitude = 1.3;
    expect_alike(compare(x, stored, {32, 4}, kChunks, {}, rope));
  }
}

TEST(PackedArrays, GrowsByBlocksOfCodes) {
  const Sequence x(1, 600, 64);
  const auto stored = patched(64, Rotation::kFull, 3);
  const Rope rope({}, 64);
  const auto cache = arrays_of(stored, {32, 4});
  const auto bytes_at = [&](int begin, int end) {
    cache->attend(cut(x.q, begin, end), cut(x.k, begin, end), cut(x.v, begin, end), {.scale = 1.0f, .rope = &rope});
    return cache->nbytes();
  };
  // The block that grows is there from the begin, with a float for each of its patches.
  std::size_t block = 0;
  for (const auto* side : {&stored.keys, &stored.values})
    for (const auto& unit : *side) block += (make_quantizer(unit)->encoded_bytes(256) + 15) / 16 * 16;
  const std::size_t exact = 36 * 2 * 2 * 68, errors = 2 * 2 * 3 * 4;
  EXPECT_EQ(bytes_at(0, 36), exact + block + errors);
  EXPECT_EQ(bytes_at(36, 36 + 255), exact + block + errors);
  EXPECT_EQ(bytes_at(36 + 255, 36 + 257), exact + 2 * block + errors);
}

TEST(PackedArrays, NothingIsEvaluatedUntilTheResultIs) {
  const Sequence x(1, 400, 64);
  const Rope rope({}, 64);
  const auto cache = arrays_of(patched(64, Rotation::kFull, 3), {32, 4});
  std::optional<mx::array> out;
  for (int begin = 0; begin < 400; begin += 100)
    out = cache->attend(cut(x.q, begin, begin + 100), cut(x.k, begin, begin + 100), cut(x.v, begin, begin + 100), {.rope = &rope});
  ASSERT_EQ(cache->pending().size(), 4);
  for (const auto& array : cache->pending()) EXPECT_FALSE(array.is_available());
  mx::eval(*out);
  for (const auto& array : cache->pending()) EXPECT_TRUE(array.is_available());
}

TEST(PackedArrays, RefusesOtherShapesAndWhatItCannotStore) {
  const Sequence x(1, 64, 64);
  const Rope rope({}, 64);
  const AttentionSpec spec{.rope = &rope};
  const auto cache = arrays_of(patched(64, Rotation::kFull, 0), {4, 0});
  EXPECT_THAT([&] { cache->attend(x.q, cut(x.k, 0, 8), x.v, spec); },
              ::testing::ThrowsMessage<std::invalid_argument>(::testing::HasSubstr("got [1, 2, 8, 64] and [1, 2, 64, 64]")));
  EXPECT_THAT(
      [&] {
        arrays_of(of_method(x, 64, "kivi", 2), {0, 0});
      },
      ::testing::ThrowsMessage<std::invalid_argument>(::testing::HasSubstr("kivi groups 32 tokens")));
}

// Where our kernels do not run a plan gets these caches, of units of all heads here, and a model's logits are those of the other
// kind.
TEST(PackedArrays, ModelsRunWithThem) {
  const auto plan = make_plan(demo_model(), text_samples(2, 128), {.method = "vecinfer", .bits = 2});
  const auto samples = text_samples(1, 256);
  const auto logits = [&] {
    const auto caches = demo_model().make_caches(packed_factory(plan));
    const auto x = demo_model().logits(demo_model().forward(mx::array(samples.tokens.data(), {1, 256}, mx::int32), caches));
    mx::eval(x);
    return std::pair(x, dynamic_cast<PackedArrays*>(caches[0].get()) != nullptr);
  };
  const auto [ours, ours_are_arrays] = logits();
  const MlxOperationsScope scope;
  const auto [theirs, theirs_are_arrays] = logits();
  EXPECT_FALSE(ours_are_arrays);
  EXPECT_TRUE(theirs_are_arrays);
  const auto error = mx::divide(mx::abs(mx::subtract(ours, theirs)), mx::max(mx::abs(ours)));
  EXPECT_LT(mx::mean(error).item<float>(), 2e-3f);
}

}  // namespace
}  // namespace veloxquant
