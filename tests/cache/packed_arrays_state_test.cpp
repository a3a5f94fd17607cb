// The life of PackedArrays, beside that of PackedCache.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "tests/cache/packed_inputs.h"
#include "veloxquant/cache/packed_arrays.h"
#include "veloxquant/cache/packed_cache.h"

namespace veloxquant {
namespace {

using namespace testing;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

constexpr int kDim = 32;

// One layer in both kinds, and what its caches are given.
struct Layer {
  Sequence x;
  std::shared_ptr<const PackedLayer> packed_layer;
  std::shared_ptr<const PackedArraysLayer> arrays_layer;
  Rope rope{RopeConfig{}, kDim};
  double rounding;

  Layer(const Stored& units, int window, int sinks, int tokens, int batch = 1)
      : x(batch, tokens, kDim),
        packed_layer(std::make_shared<PackedLayer>(units.keys, units.values, window, sinks)),
        arrays_layer(std::make_shared<PackedArraysLayer>(units.keys, units.values, window, sinks)),
        rounding(units.keys[0].method == "vecinfer"     ? kScanRounding
                 : units.keys[0].method == "rotated_pq" ? kWholeRounding
                                                        : kRounding) {}

  PackedCache packed() const { return PackedCache(packed_layer); }
  PackedArrays arrays() const { return PackedArrays(arrays_layer); }

  mx::array append(AttentionCache& cache, int begin, int end, const std::vector<int>& padding = {}) const {
    AttentionSpec spec{.scale = 0.3f, .rope = &rope};
    if (!padding.empty()) spec.padding = mx::array(padding.begin(), {static_cast<int>(padding.size())}, mx::int32);
    return cache.attend(cut(x.q, begin, end), cut(x.k, begin, end), cut(x.v, begin, end), spec);
  }

  void expect_alike(const mx::array& got, const mx::array& expected) const {
    ASSERT_EQ(got.shape(), expected.shape());
    EXPECT_LT(mx::max(mx::abs(mx::subtract(got, expected))).item<float>() / mx::max(mx::abs(expected)).item<float>(), rounding);
  }
};

// Patches of 5 · 35 bytes, so that blocks end within 16.
std::vector<Stored> some_methods() {
  const Sequence x(1, 400, kDim, 20);
  return {rotated(x, kDim, Rotation::kFull, 5), rotated(x, kDim, Rotation::kPlane, 0), of_method(x, kDim, "affine", 3),
          of_method(x, kDim, "vecinfer", 2)};
}

TEST(PackedArraysState, OneKindGoesOnWhereTheOtherStopped) {
  for (const auto& stored : some_methods())
    for (const auto& [window, sinks] : {std::pair{32, 4}, {0, 0}, {0, 4}, {32, 0}})
      for (const int tokens : {3, 36, 200, 256, 292, 600}) {
        SCOPED_TRACE(::testing::Message() << stored.keys[0].method << " window " << window << " sinks " << sinks << " " << tokens);
        const Layer layer(stored, window, sinks, 700);
        auto packed = layer.packed();
        auto arrays = layer.arrays();
        layer.append(packed, 0, tokens);
        const auto state = packed.state();
        arrays.restore(state);
        EXPECT_EQ(arrays.offset(), tokens);
        EXPECT_EQ(checksum("", arrays.state()), checksum("", state));
        layer.expect_alike(layer.append(arrays, 600, 605), layer.append(packed, 600, 605));
        packed.restore(arrays.state());
        layer.expect_alike(layer.append(arrays, 605, 606), layer.append(packed, 605, 606));
        layer.expect_alike(layer.append(arrays, 606, 700), layer.append(packed, 606, 700));
      }
}

TEST(PackedArraysState, AnyOrderOfAppendingAndTrimming) {
  std::mt19937 random(0);
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  for (const auto& stored : some_methods())
    for (const auto& [window, sinks] : {std::pair{0, 0}, {32, 4}, {5, 300}}) {
      SCOPED_TRACE(::testing::Message() << stored.keys[0].method << " window " << window << " sinks " << sinks);
      const Layer layer(stored, window, sinks, 700, 2);
      auto arrays = layer.arrays();
      int tokens = 0;
      for (int step = 0; step < 8; ++step) {
        // The same codes in both.
        auto packed = layer.packed();
        packed.restore(arrays.state());
        const int dropped = step % 3 == 2 ? (below(2) ? below(tokens + 20) : below(20)) : 0;
        EXPECT_EQ(arrays.trim(dropped), packed.trim(dropped));
        tokens = std::max(0, tokens - dropped);
        EXPECT_EQ(arrays.offset(), tokens);
        const int begin = below(400), count = 1 + below(below(2) ? 290 : 5);
        const auto clone = arrays.clone();
        const auto out = layer.append(arrays, begin, begin + count);
        layer.expect_alike(out, layer.append(packed, begin, begin + count));
        EXPECT_TRUE(mx::array_equal(out, layer.append(*clone, begin, begin + count)).item<bool>());
        tokens += count;
      }
    }
}

TEST(PackedArraysState, PatchesOfTrimmedTokensGo) {
  const Layer layer(some_methods()[0], 0, 0, 700);
  auto packed = layer.packed();
  auto arrays = layer.arrays();
  layer.append(packed, 0, 600);
  for (const int kept : {590, 513, 512, 511, 256, 100, 3}) {
    SCOPED_TRACE(kept);
    arrays.restore(packed.state());
    EXPECT_EQ(arrays.trim(arrays.offset() - kept), packed.trim(packed.offset() - kept));
    auto got = arrays.state(), expected = packed.state();
    EXPECT_TRUE(mx::allclose(got.at("patch_errors"), expected.at("patch_errors"), 1e-4).item<bool>());
    EXPECT_TRUE(mx::array_equal(got.at("blocks"), expected.at("blocks")).item<bool>());
    layer.expect_alike(layer.append(arrays, 600, 601), layer.append(packed, 600, 601));
  }
}

TEST(PackedArraysState, SequencesHaveTheirOwnTokens) {
  const std::vector<int> padding = {0, 70, 299}, ends = {2, 90, 91, 300, 420, 421};
  for (const auto& stored : some_methods())
    for (const auto& [window, sinks] : {std::pair{0, 0}, {32, 4}}) {
      SCOPED_TRACE(::testing::Message() << stored.keys[0].method << " window " << window << " sinks " << sinks);
      const Layer layer(stored, window, sinks, ends.back(), 3);
      auto packed = layer.packed();
      auto arrays = layer.arrays();
      for (std::size_t i = 0; i < ends.size(); ++i) {
        const int begin = i == 0 ? 0 : ends[i - 1];
        layer.expect_alike(layer.append(arrays, begin, ends[i], padding), layer.append(packed, begin, ends[i], padding));
        packed.restore(arrays.state());
      }
      EXPECT_THAT(arrays.tokens(), ElementsAre(421, 351, 122));
      EXPECT_EQ(arrays.trim(100), packed.trim(100));
      EXPECT_THAT(arrays.tokens(), ElementsAre(321, 251, 22));
      auto restored = layer.arrays();
      restored.restore(arrays.state());
      EXPECT_EQ(restored.nbytes(), arrays.nbytes());
      layer.expect_alike(layer.append(restored, 0, 50, padding), layer.append(packed, 0, 50, padding));

      // Of the same number again, and one alone.
      auto two = layer.arrays(), one = layer.arrays();
      two.restore(select_sequences(arrays.state(), {1, 1, 1}));
      one.restore(select_sequences(arrays.state(), {1}));
      EXPECT_THAT(two.tokens(), ElementsAre(251, 251, 251));
      EXPECT_EQ(two.nbytes(), 3 * one.nbytes());
      auto joined = layer.arrays();
      joined.restore(join_sequences(std::vector<CacheState>{one.state(), empty_state(1), arrays.state()}));
      EXPECT_THAT(joined.tokens(), ElementsAre(251, 0, 321, 251, 22));
    }
}

TEST(PackedArraysState, SequencesThatPartLaterAreCutBackToBeforeThat) {
  const Layer layer(some_methods()[0], 32, 4, 420, 3);
  auto packed = layer.packed();
  auto arrays = layer.arrays();
  layer.expect_alike(layer.append(arrays, 0, 400), layer.append(packed, 0, 400));
  const std::vector<int> padding = {0, 5, 9};
  layer.expect_alike(layer.append(arrays, 400, 410, padding), layer.append(packed, 400, 410, padding));
  EXPECT_EQ(arrays.trim(100), packed.trim(100));
  EXPECT_EQ(arrays.tokens(), packed.tokens());
  layer.expect_alike(layer.append(arrays, 410, 420, padding), layer.append(packed, 410, 420, padding));
}

TEST(PackedArraysState, RefusesWhatDoesNotFit) {
  const Layer layer(some_methods()[0], 32, 4, 400, 2), wide(some_methods()[0], 33, 4, 400);
  auto arrays = layer.arrays();
  layer.append(arrays, 0, 300);
  const auto state = arrays.state();
  auto changed = state;
  changed.insert_or_assign("blocks", mx::zeros({2, 2, 10}, mx::uint8));
  EXPECT_THAT([&] { arrays.restore(changed); }, ThrowsMessage<std::invalid_argument>(HasSubstr("blocks: expected")));
  EXPECT_THAT([&] { wide.arrays().restore(state); }, ThrowsMessage<std::invalid_argument>(HasSubstr("window: expected")));
  EXPECT_THAT(
      [&] {
        layer.append(arrays, 300, 302, {0, 6});
      },
      ThrowsMessage<std::invalid_argument>(HasSubstr("padding of sequence 1: expected one that leaves it 300 to 302")));
  auto three = layer.arrays();
  three.restore(empty_state(3));
  EXPECT_THAT([&] { layer.append(three, 0, 1); }, ThrowsMessage<std::invalid_argument>(HasSubstr("of shape [3, 2, 1, 32]")));
  EXPECT_EQ(checksum("", arrays.state()), checksum("", state));

  // A first call that is refused settles nothing.
  auto fresh = layer.arrays();
  EXPECT_THROW(layer.append(fresh, 0, 3, {0, 1, 2}), std::invalid_argument);
  EXPECT_TRUE(fresh.tokens().empty());
}

}  // namespace
}  // namespace veloxquant
