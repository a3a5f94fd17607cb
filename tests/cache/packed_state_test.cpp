#include "veloxquant/cache/packed_state.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "tests/cache/packed_inputs.h"
#include "veloxquant/cache/packed_cache.h"

namespace veloxquant {
namespace {

using namespace veloxquant::testing;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

constexpr int kDim = 32;

// One layer, and what its caches are given.
struct Layer {
  Sequence x;
  std::shared_ptr<const PackedLayer> stored;
  Rope rope{RopeConfig{}, kDim};

  Layer(const Stored& units, int window, int sinks, int tokens, int batch = 1)
      : x(batch, tokens, kDim), stored(std::make_shared<PackedLayer>(units.keys, units.values, window, sinks)) {}

  PackedCache cache() const { return PackedCache(stored); }

  // Tokens begin … end − 1 → what attention gives.
  mx::array append(PackedCache& cache, int begin, int end, const std::vector<int>& padding = {}) const {
    AttentionSpec spec{.scale = 0.3f, .rope = &rope};
    if (!padding.empty()) spec.padding = mx::array(padding.begin(), {static_cast<int>(padding.size())}, mx::int32);
    const auto out = cache.attend(cut(x.q, begin, end), cut(x.k, begin, end), cut(x.v, begin, end), spec);
    EXPECT_TRUE(mx::all(mx::isfinite(out)).item<bool>());
    return out;
  }

  // The same of sequence b alone.
  Layer alone(int b) const {
    const auto of = [b](const mx::array& y) {
      return mx::contiguous(mx::slice(y, {b, 0, 0, 0}, {b + 1, y.shape(1), y.shape(2), y.shape(3)}));
    };
    Layer one = *this;
    one.x.q = of(x.q), one.x.k = of(x.k), one.x.v = of(x.v);
    return one;
  }
};

std::vector<Stored> every_method(int patches) {
  const Sequence x(1, 400, kDim, 20);
  std::vector<Stored> stored = {rotated(x, kDim, Rotation::kFull, patches), rotated(x, kDim, Rotation::kPlane, patches)};
  for (const char* method : {"affine", "vecinfer"}) stored.push_back(of_method(x, kDim, method, 2));
  return stored;
}

bool same(const mx::array& a, const mx::array& b) {
  return mx::array_equal(a, b).item<bool>();
}

double difference(const mx::array& a, const mx::array& b) {
  return mx::max(mx::abs(mx::subtract(a, b))).item<float>() / mx::max(mx::abs(b)).item<float>();
}

struct Restored : PackedCache {
  Restored(const Layer& layer, const CacheState& state) : PackedCache(layer.stored) { restore(state); }
};

TEST(PackedState, WhatIsTrimmedWasNeverThere) {
  struct Case {
    int window, sinks, kept, dropped;
  };
  for (const auto& stored : every_method(0))
    for (const auto& [window, sinks, kept, dropped] : {
             Case{300, 50, 120, 200},  // nothing is coded yet
             {0, 4, 10, 1},
             {0, 4, 257, 3},
             {0, 0, 255, 40},
             {0, 0, 300, 290},
             {0, 4, 3, 300},  // no window
         }) {
      SCOPED_TRACE(::testing::Message() << "window " << window << " kept " << kept << " dropped " << dropped);
      const Layer layer(stored, window, sinks, 640);
      PackedCache trimmed = layer.cache(), other = layer.cache();
      layer.append(trimmed, 0, kept), layer.append(other, 0, kept);
      layer.append(trimmed, 640 - dropped, 640);
      EXPECT_EQ(trimmed.trim(dropped), dropped);
      EXPECT_EQ(trimmed.offset(), kept);
      EXPECT_EQ(trimmed.nbytes(), other.nbytes());
      EXPECT_TRUE(same(layer.append(trimmed, kept, kept + 20), layer.append(other, kept, kept + 20)));
      EXPECT_TRUE(same(layer.append(trimmed, 400, 401), layer.append(other, 400, 401)));
    }
}

TEST(PackedState, WhatIsTrimmedIsForgottenOnceTheWindowIsFullAgain) {
  for (const auto& stored : every_method(0))
    for (const auto& [dropped, after] : {std::pair{1, 1}, {20, 20}, {32, 40}, {100, 100}, {190, 200}}) {
      const Layer layer(stored, 32, 4, 640);
      PackedCache trimmed = layer.cache(), other = layer.cache();
      layer.append(trimmed, 0, 200), layer.append(other, 0, 200);
      layer.append(trimmed, 640 - dropped, 640);
      trimmed.trim(dropped);
      layer.append(trimmed, 200, 200 + after), layer.append(other, 200, 200 + after);
      EXPECT_TRUE(same(layer.append(trimmed, 500, 507), layer.append(other, 500, 507))) << dropped;
    }
}

TEST(PackedState, CodesReachIntoATrimmedWindow) {
  // 200 tokens, of which 164 are codes.  A query after a trim sees what it would see with a window that begins behind them.
  for (const auto& stored : every_method(0))
    for (const int dropped : {1, 31, 32, 40}) {
      const Layer layer(stored, 32, 4, 320), narrow(stored, std::max(1, 33 - dropped), 4, 320);
      PackedCache trimmed = layer.cache(), other = narrow.cache();
      layer.append(trimmed, 0, 200);
      trimmed.trim(dropped);
      narrow.append(other, 0, 200 - dropped);
      EXPECT_TRUE(same(layer.append(trimmed, 300, 301), narrow.append(other, 300, 301))) << dropped;
    }
}

TEST(PackedState, PatchesOfTrimmedTokensGo) {
  for (const auto& stored : every_method(5)) {
    const Layer layer(stored, 0, 0, 1000);
    // Back to the begin of a block: nothing was displaced in those before.
    PackedCache trimmed = layer.cache(), other = layer.cache();
    layer.append(trimmed, 0, 700), layer.append(other, 0, 512);
    trimmed.trim(188);
    EXPECT_TRUE(same(layer.append(trimmed, 800, 900), layer.append(other, 800, 900)));
    // Into a block: close to what the codes alone would be, and patches are chosen anew among what comes.
    for (const int kept : {511, 301, 257, 100, 3}) {
      PackedCache back = layer.cache(), never = layer.cache();
      layer.append(back, 0, 520), layer.append(never, 0, kept);
      back.trim(520 - kept);
      EXPECT_LT(difference(layer.append(back, 900, 940), layer.append(never, 900, 940)), 0.5) << kept;
      EXPECT_EQ(back.nbytes(), never.nbytes());
    }
  }
}

TEST(PackedState, AnyOrderOfAppendingAndTrimmingIsRestoredExactly) {
  std::mt19937 random(0);
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  for (const auto& stored : every_method(3))
    for (const auto& [window, sinks] : {std::pair{0, 0}, {32, 4}, {5, 300}}) {
      const Layer layer(stored, window, sinks, 600, 2);
      PackedCache cache = layer.cache();
      int tokens = 0;
      for (int step = 0; step < 16; ++step) {
        if (step % 3 == 2) {
          const int dropped = below(2) ? below(tokens + 20) : below(20);
          EXPECT_EQ(cache.trim(dropped), std::min(dropped, tokens));
          tokens = std::max(0, tokens - dropped);
        } else {
          const int begin = below(400), count = 1 + below(below(2) ? 190 : 5);
          Restored copy(layer, cache.state());
          const auto clone = cache.clone();
          const auto out = layer.append(cache, begin, begin + count);
          EXPECT_TRUE(same(out, layer.append(copy, begin, begin + count)));
          EXPECT_TRUE(same(out, layer.append(dynamic_cast<PackedCache&>(*clone), begin, begin + count)));
          tokens += count;
        }
        EXPECT_EQ(cache.offset(), tokens);
        EXPECT_THAT(cache.tokens(), ::testing::Each(tokens));
        EXPECT_EQ(Restored(layer, cache.state()).nbytes(), cache.nbytes());
      }
    }
}

TEST(PackedState, ACopyIsIndependent) {
  const Layer layer(every_method(3)[0], 32, 4, 640);
  PackedCache cache = layer.cache(), same_tokens = layer.cache();
  layer.append(cache, 0, 300), layer.append(same_tokens, 0, 300);
  const auto copy = cache.clone();
  layer.append(dynamic_cast<PackedCache&>(*copy), 400, 600);
  EXPECT_EQ(cache.offset(), 300);
  EXPECT_EQ(copy->offset(), 500);
  EXPECT_TRUE(same(layer.append(cache, 300, 320), layer.append(same_tokens, 300, 320)));
}

TEST(PackedState, PaddedSequencesAreWhatTheyAreAlone) {
  const std::vector<int> padding = {0, 70, 299};
  const std::vector<int> ends = {2, 90, 91, 300, 420, 421};
  for (const auto& stored : every_method(3))
    for (const auto& [window, sinks] : {std::pair{0, 0}, {32, 4}}) {
      const Layer layer(stored, window, sinks, ends.back(), 3);
      PackedCache batch = layer.cache();
      std::vector<mx::array> outs;
      for (std::size_t i = 0; i < ends.size(); ++i) outs.push_back(layer.append(batch, i == 0 ? 0 : ends[i - 1], ends[i], padding));
      EXPECT_THAT(batch.tokens(), ::testing::ElementsAre(421, 351, 122));
      const auto all = mx::concatenate(outs, 2);
      for (int b = 0; b < 3; ++b) {
        const Layer one = layer.alone(b);
        PackedCache alone = one.cache();
        int begin = padding[static_cast<std::size_t>(b)];
        std::vector<mx::array> expected;
        for (const int end : ends)
          if (end > begin) expected.push_back(one.append(alone, begin, end)), begin = end;
        const auto got = mx::slice(all, {b, 0, padding[static_cast<std::size_t>(b)], 0}, {b + 1, kQueryHeads, 421, kDim});
        EXPECT_LT(difference(got, mx::concatenate(expected, 2)), kWholeRounding) << b;
      }
    }
}

TEST(PackedState, JoinedSequencesGoOnAsAlone) {
  for (const auto& stored : every_method(3)) {
    const Layer layer(stored, 32, 4, 420, 3);
    const std::vector<int> counts = {400, 0, 61};
    std::vector<Layer> ones;
    std::vector<CacheState> states;
    for (int b = 0; b < 3; ++b) {
      ones.push_back(layer.alone(b));
      PackedCache alone = ones.back().cache();
      const int count = counts[static_cast<std::size_t>(b)];
      if (count > 0) ones.back().append(alone, 0, count);
      states.push_back(count > 0 ? alone.state() : empty_state(1));
    }
    Restored batch(layer, join_sequences(states));
    EXPECT_EQ(batch.offset(), 400);
    EXPECT_EQ(batch.tokens(), counts);
    // The last 15, 20 and 6 of 20 tokens are theirs.
    const auto out = layer.append(batch, 400, 420, {5, 400, 353});
    EXPECT_THAT(batch.tokens(), ::testing::ElementsAre(415, 20, 67));
    const std::vector<int> came = {15, 20, 6};
    for (int b = 0; b < 3; ++b) {
      const auto i = static_cast<std::size_t>(b);
      Restored alone(layer, states[i]);
      const auto expected = ones[i].append(alone, 420 - came[i], 420);
      EXPECT_LT(difference(mx::slice(out, {b, 0, 20 - came[i], 0}, {b + 1, kQueryHeads, 20, kDim}), expected), kWholeRounding);
      // And taken out again.
      const auto state = select_sequences(batch.state(), {b});
      EXPECT_EQ(checksum("", state), checksum("", alone.state()));
    }
  }
}

TEST(PackedState, RefusesPaddingThatTokensContradict) {
  const Layer layer(every_method(0)[2], 4, 0, 100, 2);
  PackedCache cache = layer.cache();
  layer.append(cache, 0, 10, {0, 3});
  EXPECT_THAT(
      [&] {
        layer.append(cache, 10, 12, {0, 6});
      },
      ThrowsMessage<std::invalid_argument>(HasSubstr("padding of sequence 1: expected one that leaves it 7 to 9 tokens")));
  EXPECT_THAT([&] { layer.append(cache, 10, 12, {0}); }, ThrowsMessage<std::invalid_argument>(HasSubstr("expected [2], got [1]")));
  EXPECT_THAT(cache.tokens(), ::testing::ElementsAre(10, 7));
}

TEST(PackedState, ARefusedFirstCallFixesNothing) {
  const Layer layer(every_method(0)[2], 4, 0, 100, 2);
  PackedCache cache = layer.cache();
  EXPECT_THAT([&] { layer.append(cache, 0, 10, {0, -1}); }, ThrowsMessage<std::invalid_argument>(HasSubstr("which leaves 11")));
  EXPECT_EQ(checksum("", cache.state()), checksum("", layer.cache().state()));
  const Layer alone = layer.alone(1);
  PackedCache other = layer.cache();
  EXPECT_TRUE(same(alone.append(cache, 0, 10), alone.append(other, 0, 10)));
  EXPECT_THAT(cache.tokens(), ::testing::ElementsAre(10));
}

TEST(PackedState, RefusesChunksThatAreNone) {
  const auto check = [](const mx::Shape& queries, const mx::Shape& keys) {
    return [=] { check_chunk(mx::zeros(queries), mx::zeros(keys), mx::zeros(keys), keys); };
  };
  const auto refuses = [](const char* what) { return ThrowsMessage<std::invalid_argument>(HasSubstr(what)); };
  EXPECT_NO_THROW(check({1, 4, 8, 32}, {1, 2, 8, 32})());
  EXPECT_THAT(check({1, 5, 8, 32}, {1, 2, 8, 32}), refuses("queries of shape [1, 4, 8, 32], got [1, 5, 8, 32]"));
  EXPECT_THAT(check({1, 0, 8, 32}, {1, 2, 8, 32}), refuses("queries of shape [1, 2, 8, 32], got [1, 0, 8, 32]"));
  EXPECT_THAT(check({1, 4, 7, 32}, {1, 2, 8, 32}), refuses("queries of shape [1, 4, 8, 32], got [1, 4, 7, 32]"));
  EXPECT_THAT(check({1, 4, 8, 32}, {1, 0, 8, 32}), refuses("one KV head and one token or more, got [1, 0, 8, 32]"));
  EXPECT_THAT(check({1, 4, 0, 32}, {1, 2, 0, 32}), refuses("got [1, 2, 0, 32]"));
  EXPECT_THAT(check({0, 4, 8, 32}, {0, 2, 8, 32}), refuses("got [0, 2, 8, 32]"));
}

TEST(PackedState, AnyBytesCanBeRead) {
  std::mt19937 random(0);
  auto methods = every_method(3);
  methods.push_back(of_method(Sequence(1, 400, kDim, 20), kDim, "turboquant", 2));
  for (const auto& stored : methods) {
    const Layer layer(stored, 32, 4, 400);
    PackedCache cache = layer.cache();
    layer.append(cache, 0, 300);
    const auto state = cache.state();
    for (const char* name : {"blocks", "patch_errors", "sinks", "window"}) {
      auto& array = const_cast<mx::array&>(state.at(name));
      std::generate_n(array.data<std::uint8_t>(), array.nbytes(), [&] { return static_cast<std::uint8_t>(random()); });
    }
    cache.restore(state);
    for (const int dropped : {0, 40, 3, 240}) {
      cache.trim(dropped);
      const auto some = [&](const mx::array& x) { return cut(x, 0, 30); };
      cache.attend(some(layer.x.q), some(layer.x.k), some(layer.x.v), {.rope = &layer.rope});
    }
    EXPECT_EQ(cache.offset(), 137);
  }
}

TEST(PackedState, RefusesStatesThatDoNotFit) {
  const auto stored = every_method(3)[0];
  const Layer layer(stored, 32, 4, 400), wide(stored, 33, 4, 400);
  PackedCache cache = layer.cache();
  layer.append(cache, 0, 300);
  const auto state = cache.state();
  const auto refuses = [&](const char* name, const mx::array& array, const char* problem) {
    auto changed = state;
    changed.insert_or_assign(name, array);
    EXPECT_THAT([&] { cache.restore(changed); }, ThrowsMessage<std::invalid_argument>(HasSubstr(problem))) << name;
  };
  const auto whole = [](int value) { return mx::array({value}, {1}, mx::int32); };
  refuses("offset", whole(-1), "offset: expected 0 to");
  refuses("tokens", whole(301), "tokens: expected 0 to 300, got 301");
  refuses("tokens", mx::array({300.0f}), "both int32");
  refuses("coded", whole(263), "coded: expected 264 to 296, got 263");
  refuses("coded", whole(297), "coded: expected 264 to 296, got 297");
  refuses("coded", whole(256), "coded");
  refuses("blocks", mx::zeros({1, 2, 10}, mx::uint8), "blocks: expected");
  refuses("window", state.at("sinks"), "window: expected");
  refuses("sinks", mx::zeros({1, 3, 2, 4, 36}, mx::uint8), "expected keys of 2 KV heads, got 3");
  refuses("more", whole(0), "expected a state without more");
  auto less = state;
  less.erase("window");
  EXPECT_THAT([&] { cache.restore(less); }, ThrowsMessage<std::invalid_argument>(HasSubstr("expected a state with window")));
  EXPECT_THAT([&] { wide.cache().restore(state); }, ThrowsMessage<std::invalid_argument>(HasSubstr("window: expected")));
  EXPECT_EQ(checksum("", cache.state()), checksum("", state));
}

TEST(PackedState, RefusesTokensOfNoHeads) {
  const Layer layer(every_method(0)[2], 32, 4, 400);  // all heads alike
  PackedCache cache = layer.cache();
  layer.append(cache, 0, 300);
  auto state = cache.state();
  state.insert_or_assign("blocks", mx::zeros({1, 2, 0}, mx::uint8));
  state.insert_or_assign("patch_errors", mx::zeros({1, 0, 2, 0}));
  for (const char* name : {"sinks", "window"}) {
    auto shape = state.at(name).shape();
    shape[1] = 0;
    state.insert_or_assign(name, mx::zeros(shape, mx::uint8));
  }
  EXPECT_THAT([&] { cache.restore(state); }, ThrowsMessage<std::invalid_argument>(HasSubstr("one KV head or more, got 0")));
}

}  // namespace
}  // namespace veloxquant
