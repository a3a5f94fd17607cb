#include "veloxquant/cache/restoring_cache.h"

#include <gtest/gtest.h>

#include "mlx/ops.h"
#include "mlx/random.h"
#include "mlx/transforms.h"
#include "veloxquant/cache/restore_graph.h"
#include "veloxquant/model/attention.h"
#include "veloxquant/model/cpu_operation.h"

namespace veloxquant {
namespace {

mx::array random_array(const mx::Shape& shape, std::uint64_t seed) {
  const auto x = mx::random::normal(shape, mx::float32, mx::random::key(seed));
  mx::eval(x);
  return x;
}

float mean_square(const mx::array& x) {
  return mx::mean(mx::square(x)).item<float>();
}

QuantizerParameters fitted(const QuantizerMethod& method, Side side, int dim, double width, const mx::array& x) {
  return method.fit({x.data<float>(), x.size()}, dim, {.side = side, .width = width, .seed = 3});
}

// Every method of the table, on the CPU by its own code and by the graph that GPUs run.  A value within rounding of a boundary may
// get another code: such vectors must be rare.
TEST(RestoreGraph, EqualsTheQuantizerForEveryMethod) {
  for (const auto& method : quantizer_methods()) {
    for (const int dim : {32, 64, 128}) {
      for (const Side side : {Side::kKeys, Side::kValues}) {
        const auto x = random_array({2, 3, 77, dim}, 5);
        const auto widths = method.widths(dim);
        for (const double width : {widths.front(), widths[widths.size() / 2]}) {
          SCOPED_TRACE(::testing::Message() << method.name << " dim " << dim << " " << to_string(side) << " width " << width);
          const Restore restore = make_restore(fitted(method, side, dim, width, x));
          const auto ours = restore.apply(x);
          mx::eval(ours);
          const MlxOperationsScope scope;
          const auto theirs = restore.apply(x);
          const auto error = mx::max(mx::abs(mx::subtract(ours, theirs)), -1);
          EXPECT_GE(mx::mean(mx::astype(mx::less(error, mx::array(1e-4f)), mx::float32)).item<float>(), 0.99f);
          const float ours_lost = mean_square(mx::subtract(x, ours)), theirs_lost = mean_square(mx::subtract(x, theirs));
          EXPECT_NEAR(ours_lost, theirs_lost, 0.01f * theirs_lost);
        }
      }
    }
  }
}

struct Attended {
  mx::array whole, chunked;
};

// The same tokens in one go and in chunks.
Attended attend_both(const Restore& keys, const Restore& values, const std::vector<int>& chunks, int tokens) {
  const Rope rope({}, 64);
  const AttentionSpec spec{.scale = 0.125f, .rope = &rope};
  const auto q = random_array({1, 4, tokens, 64}, 1), k = random_array({1, 2, tokens, 64}, 2),
             v = random_array({1, 2, tokens, 64}, 3);
  RestoringCache whole(keys, values), chunked(keys, values);
  const auto expected = whole.attend(q, k, v, spec);
  std::vector<mx::array> parts;
  int begin = 0;
  const auto cut = [&](const mx::array& x, int end) {
    return mx::slice(x, {0, 0, begin, 0}, {x.shape(0), x.shape(1), end, x.shape(3)});
  };
  for (const int size : chunks) {
    const int end = begin + size;
    parts.push_back(chunked.attend(cut(q, end), cut(k, end), cut(v, end), spec));
    mx::eval(parts.back());
    begin = end;
  }
  EXPECT_EQ(begin, tokens);
  EXPECT_EQ(chunked.offset(), tokens);
  return {expected, mx::concatenate(parts, 2)};
}

Restore restore_of(const char* method, Side side, double width) {
  return make_restore(quantizer_method(method).fit({}, 64, {.side = side, .width = width}));
}

TEST(RestoringCache, ChunksOfWholeGroupsEqualOneGo) {
  const auto [whole, chunked] =
      attend_both(restore_of("kivi", Side::kKeys, 2), restore_of("kivi", Side::kValues, 2), {64, 32, 96}, 192);
  // The last group is complete in both; earlier queries saw the same groups.
  EXPECT_LE(mx::max(mx::abs(mx::subtract(whole, chunked))).item<float>(), 1e-5f);
}

TEST(RestoringCache, TokensOfAnOpenGroupAreRestoredAnew) {
  // Whatever the chunks, once all groups are complete the last query sees what it sees in one go.
  const auto [whole, chunked] =
      attend_both(restore_of("kivi", Side::kKeys, 2), restore_of("kivi", Side::kValues, 2), {7, 1, 30, 25, 1, 31, 1}, 96);
  const auto last = [](const mx::array& x) { return mx::slice(x, {0, 0, 95, 0}, {1, 4, 96, 64}); };
  EXPECT_LE(mx::max(mx::abs(mx::subtract(last(whole), last(chunked)))).item<float>(), 1e-5f);
}

TEST(RestoringCache, TokenByTokenEqualsOneGoWithoutGroups) {
  const auto [whole, chunked] =
      attend_both(restore_of("turboquant", Side::kKeys, 3), restore_of("affine", Side::kValues, 3), std::vector<int>(40, 1), 40);
  EXPECT_LE(mx::max(mx::abs(mx::subtract(whole, chunked))).item<float>(), 1e-5f);
}

TEST(RestoringCache, ManyBitsComeCloseToFullPrecision) {
  const Rope rope({}, 64);
  const AttentionSpec spec{.scale = 0.125f, .rope = &rope};
  const auto q = random_array({1, 4, 50, 64}, 1), k = random_array({1, 2, 50, 64}, 2), v = random_array({1, 2, 50, 64}, 3);
  FullCache full;
  const auto expected = full.attend(q, k, v, spec);
  float before = 1e9f;
  for (const double width : {1.0, 2.0, 4.0, 8.0}) {
    RestoringCache cache(restore_of("affine", Side::kKeys, width), restore_of("affine", Side::kValues, width));
    const float lost = mean_square(mx::subtract(expected, cache.attend(q, k, v, spec)));
    EXPECT_LT(lost, before) << width;
    before = lost;
  }
  EXPECT_LT(before, 1e-5f);
}

// Window and sinks are the 8-bit copies, all others what the quantizer gives back.
TEST(RestoringCache, KeepsWindowAndSinks) {
  constexpr int kTokens = 70;
  const Rope rope({}, 64);
  const AttentionSpec spec{.scale = 0.125f, .rope = &rope};
  const auto q = random_array({1, 4, kTokens, 64}, 1), k = random_array({1, 2, kTokens, 64}, 2),
             v = random_array({1, 2, kTokens, 64}, 3);
  const Restore coarse = make_restore(fitted(quantizer_method("turboquant"), Side::kKeys, 64, 1, k)),
                exact = make_restore(exact_parameters(Side::kKeys, 64));
  const auto turned = rope(k, 0);
  const auto first = [](const mx::array& x, int begin, int end) { return mx::slice(x, {0, 0, begin, 0}, {1, 2, end, 64}); };
  for (const auto& [window, sinks] : {std::pair(9, 4), std::pair(0, 4), std::pair(5, 0), std::pair(200, 3)}) {
    SCOPED_TRACE(::testing::Message() << "window " << window << ", sinks " << sinks);
    // What leaves a window is coded from what it held.
    const auto coded = [&, w = window](const mx::array& x) { return coarse.apply(w > 0 ? exact.apply(x) : x); };
    const auto far_k = mx::concatenate({first(exact.apply(turned), 0, sinks), first(coded(turned), sinks, kTokens)}, 2),
               far_v = mx::concatenate({first(exact.apply(v), 0, sinks), first(coded(v), sinks, kTokens)}, 2);
    std::optional<NearTokens> near;
    if (window > 0) near = NearTokens{window, exact.apply(turned), exact.apply(v)};
    const auto expected = causal_attention(rope(q, 0), far_k, far_v, spec, near);
    RestoringCache whole(coarse, coarse, {window, sinks}), chunked(coarse, coarse, {window, sinks});
    EXPECT_LE(mx::max(mx::abs(mx::subtract(whole.attend(q, k, v, spec), expected))).item<float>(), 1e-5f);
    std::vector<mx::array> parts;
    int begin = 0;
    for (const int size : {1, 2, 30, 1, 1, 35}) {
      const auto cut = [&](const mx::array& x) { return mx::slice(x, {0, 0, begin, 0}, {1, x.shape(1), begin + size, 64}); };
      parts.push_back(chunked.attend(cut(q), cut(k), cut(v), spec));
      mx::eval(parts.back());
      begin += size;
    }
    EXPECT_LE(mx::max(mx::abs(mx::subtract(mx::concatenate(parts, 2), expected))).item<float>(), 1e-5f);
  }
}

// Keys before RoPE, patches by blocks of 256, one head left alone.
TEST(RestoringCache, StoresEachHeadItsOwnWay) {
  const Rope rope({}, 64);
  const AttentionSpec spec{.scale = 0.125f, .rope = &rope};
  const auto q = random_array({1, 2, 300, 64}, 1), k = random_array({1, 2, 300, 64}, 2), v = random_array({1, 2, 300, 64}, 3);
  auto parameters = fitted(quantizer_method("rotated_pq"), Side::kKeys, 64, 1, k);
  parameters.numbers["patches"] = 3;
  const Restore heads = make_restore({std::nullopt, parameters}), alone = make_restore(parameters);
  EXPECT_TRUE(heads.before_rope);
  EXPECT_EQ(heads.token_group, 256);
  const auto head = [](const mx::array& x, int h) { return mx::slice(x, {0, h, 0, 0}, {1, h + 1, 300, 64}); };
  const auto restored = heads.apply(k);
  EXPECT_TRUE(mx::array_equal(head(restored, 0), head(k, 0)).item<bool>());
  EXPECT_TRUE(mx::array_equal(head(restored, 1), alone.apply(head(k, 1))).item<bool>());
  const Restore as_it_is{[](const mx::array& x) { return x; }};
  RestoringCache cache(heads, as_it_is);
  const auto out = cache.attend(q, k, v, spec), expected = causal_attention(rope(q, 0), rope(restored, 0), v, spec);
  EXPECT_LE(mx::max(mx::abs(mx::subtract(out, expected))).item<float>(), 1e-5f);
  const MlxOperationsScope scope;
  EXPECT_LE(mx::mean(mx::abs(mx::subtract(heads.apply(k), restored))).item<float>(), 1e-2f);
}

// Keys and values of two heads as plans store them: codebooks of their own, patches, keys before RoPE.
struct PlannedLayer {
  mx::array q = random_array({1, 4, 310, 64}, 1), k = random_array({1, 2, 310, 64}, 2), v = random_array({1, 2, 310, 64}, 3);
  Rope rope{{}, 64};
  AttentionSpec spec{.scale = 0.125f, .rope = &rope};
  Restore keys = restore(k, Side::kKeys), values = restore(v, Side::kValues);

  static Restore restore(const mx::array& x, Side side) {
    std::vector<std::optional<QuantizerParameters>> heads;
    for (const int patches : {3, 8}) {
      heads.push_back(quantizer_method("rotated_pq").fit({x.data<float>(), x.size()}, 64, {.side = side, .width = 1}));
      heads.back()->numbers["patches"] = patches;
    }
    return make_restore(heads);
  }

  static mx::array cut(const mx::array& x, int begin, int end) { return mx::slice(x, {0, 0, begin, 0}, {1, x.shape(1), end, 64}); }

  mx::array attend(RestoringCache& cache, int begin, int end) const {
    const auto out = cache.attend(cut(q, begin, end), cut(k, begin, end), cut(v, begin, end), spec);
    mx::eval(out);
    return out;
  }
};

// A query at the end sees what it sees in one go, however the tokens came: patches of an open block are chosen anew.
TEST(RestoringCache, PlannedHeadsInAnyChunks) {
  const PlannedLayer layer;
  for (const auto& exact : {ExactTokens{0, 0}, ExactTokens{16, 4}, ExactTokens{1, 0}, ExactTokens{0, 3}, ExactTokens{400, 2}}) {
    RestoringCache chunked(layer.keys, layer.values, exact);
    int begin = 0;
    const auto append = [&](int count, bool compare) {
      const int end = begin + count;
      const auto out = layer.attend(chunked, begin, end);
      begin = end;
      if (!compare) return;
      RestoringCache whole(layer.keys, layer.values, exact);
      const auto expected = PlannedLayer::cut(layer.attend(whole, 0, end), end - 1, end);
      const auto last = PlannedLayer::cut(out, count - 1, count);
      EXPECT_LE(mx::max(mx::abs(mx::subtract(last, expected))).item<float>(), 1e-5f)
          << "window " << exact.window << ", sinks " << exact.sinks << ", " << end << " tokens";
    };
    for (const int count : {1, 1, 3, 7, 40, 200}) append(count, true);
    while (begin < 310) append(1, begin % 4 == 0 || begin > 300);  // past the block of 256
    EXPECT_EQ(chunked.offset(), 310);
  }
}

TEST(RestoringCache, KeepsTokensAsTheyCameWhereAsked) {
  const PlannedLayer layer;
  RestoringCache cache(layer.keys, layer.values, {310, 0, /* eight_bits= */ false});
  const auto expected = causal_attention(layer.rope(layer.q, 0), layer.rope(layer.k, 0), layer.v, layer.spec);
  EXPECT_LE(mx::max(mx::abs(mx::subtract(layer.attend(cache, 0, 310), expected))).item<float>(), 1e-5f);
}

// Where the window reaches back to the first token, all are stored at 8 bits.
TEST(RestoringCache, NothingIsCodedWithinTheWindow) {
  const PlannedLayer layer;
  RestoringCache windowed(layer.keys, layer.values, {310, 0}), sinks(layer.keys, layer.values, {0, 310});
  const Restore exact = make_restore(exact_parameters(Side::kKeys, 64));
  const auto expected =
      causal_attention(layer.rope(layer.q, 0), layer.rope(exact.apply(layer.k), 0), exact.apply(layer.v), layer.spec);
  for (RestoringCache* cache : {&windowed, &sinks})
    EXPECT_LE(mx::max(mx::abs(mx::subtract(layer.attend(*cache, 0, 310), expected))).item<float>(), 1e-5f);
}

// A vector within rounding of a boundary gets another code at times; attention hardly shows it.
TEST(RestoringCache, MlxOperationsAgreeOnWindowSinksAndHeads) {
  const PlannedLayer layer;
  RestoringCache ours(layer.keys, layer.values, {16, 4}), theirs(layer.keys, layer.values, {16, 4});
  const auto out = layer.attend(ours, 0, 310);
  const MlxOperationsScope scope;
  const auto difference = mx::abs(mx::subtract(layer.attend(theirs, 0, 310), out));
  EXPECT_LE(mx::mean(difference).item<float>(), 1e-3f);
  EXPECT_LE(mx::max(difference).item<float>(), 0.2f);
}

}  // namespace
}  // namespace veloxquant
