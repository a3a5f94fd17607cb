// The operation in MLX's graph; the kernel behind it has tests of its own.
#include "veloxquant/model/attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <utility>

#include "mlx/memory.h"
#include "mlx/ops.h"
#include "mlx/random.h"
#include "mlx/transforms.h"
#include "veloxquant/model/cpu_operation.h"

namespace veloxquant {
namespace {

mx::array normal(const mx::Shape& shape, std::uint64_t seed) {
  return mx::random::normal(shape, mx::float32, mx::random::key(seed));
}

float largest_difference(const mx::array& a, const mx::array& b) {
  return mx::max(mx::abs(mx::subtract(a, b))).item<float>();
}

// Values and gradients of our kernels against MLX's operations and their autograd.
void expect_equals_mlx(const AttentionSpec& spec, int queries, int keys, int near_window = 0) {
  SCOPED_TRACE(::testing::Message() << "T " << queries << " S " << keys << " cap " << spec.soft_cap << " window "
                                    << spec.sliding_window << " padding " << spec.padding.has_value() << " near " << near_window);
  std::vector<mx::array> inputs = {normal({3, 4, queries, 16}, 1), normal({3, 2, keys, 16}, 2), normal({3, 2, keys, 16}, 3)};
  if (near_window > 0) {
    const int tokens = std::min(keys, near_window + queries);  // one more than needed
    inputs.insert(inputs.end(), {normal({3, 2, tokens, 16}, 5), normal({3, 2, tokens, 16}, 6)});
  }
  const auto weights = normal({3, 4, queries, 16}, 4);
  const auto attention = [&](const std::vector<mx::array>& x) {
    const auto near = near_window > 0 ? std::optional(NearTokens{near_window, x[3], x[4]}) : std::nullopt;
    return std::vector<mx::array>{causal_attention(x[0], x[1], x[2], spec, near)};
  };
  const auto [ours, our_gradients] = mx::vjp(attention, inputs, {weights});
  mx::eval(ours);
  mx::eval(our_gradients);
  const MlxOperationsScope scope;
  const auto in_stretches = [&](const std::vector<mx::array>& x) {
    const auto near = near_window > 0 ? std::optional(NearTokens{near_window, x[3], x[4]}) : std::nullopt;
    return std::vector<mx::array>{causal_attention_graph(x[0], x[1], x[2], spec, near, /* scores_at_once= */ 3 * 4 * keys * 17)};
  };
  const auto expect_same = [&](const auto& function) {
    const auto [theirs, their_gradients] = mx::vjp(function, inputs, {weights});
    EXPECT_LE(largest_difference(ours[0], theirs[0]), 1e-5f);
    for (std::size_t i = 0; i < inputs.size(); ++i)
      EXPECT_LE(largest_difference(our_gradients[i], their_gradients[i]), 3e-5f) << "input " << i;
  };
  expect_same(attention);
  if (queries > 17) expect_same(in_stretches);
}

// Of the result of causal_attention_graph() for so many queries, and of all that it needs on the way.
std::size_t peak_bytes(int tokens, int near_window, std::int64_t scores_at_once) {
  const auto q = normal({1, 4, tokens, 16}, 1), k = normal({1, 2, tokens, 16}, 2), v = normal({1, 2, tokens, 16}, 3);
  const auto near = near_window > 0 ? std::optional(NearTokens{near_window, k, v}) : std::nullopt;
  mx::eval(q, k, v);
  const std::size_t before = mx::get_active_memory();
  mx::reset_peak_memory();
  mx::eval(causal_attention_graph(q, k, v, {.scale = 0.25f}, near, scores_at_once));
  return mx::get_peak_memory() - before;
}

TEST(AttentionOperation, MlxOperationsNeedNoSquareOfTheTokens) {
  const MlxOperationsScope scope;
  for (const int near : {0, 32}) {
    const auto at_once = std::int64_t{1} << 16;  // 256 KiB, where all are 4 MiB and 64 MiB
    const auto small = static_cast<double>(peak_bytes(512, near, at_once)),
               large = static_cast<double>(peak_bytes(2048, near, at_once));
    EXPECT_LE(large / small, 4.5) << near;
    EXPECT_LE(large, 8 << 20) << near;
    EXPECT_GE(peak_bytes(2048, near, std::int64_t{1} << 30), std::size_t{64} << 20) << near;
  }
}

TEST(AttentionOperation, EqualsMlxInValueAndGradient) {
  const std::vector<std::int32_t> padding = {0, 5, 70};
  for (const auto& [queries, keys] : {std::pair{1, 40}, {4, 40}, {70, 70}, {9, 300}}) {
    for (const float cap : {0.0f, 2.0f}) {
      for (const int window : {0, 13}) {
        for (const int near : {0, 1, 20, 500}) {
          AttentionSpec spec{.scale = 0.25f, .soft_cap = cap, .sliding_window = window};
          expect_equals_mlx(spec, queries, keys, near);
          spec.padding = mx::array(padding.data(), {3}, mx::int32);
          expect_equals_mlx(spec, queries, keys, near);
        }
      }
    }
  }
}

TEST(AttentionOperation, RefusesNearTokensOutsideTheirRange) {
  const auto q = normal({1, 4, 5, 16}, 1), k = normal({1, 2, 30, 16}, 2);
  const auto attend = [&](int window, int tokens, int value_tokens) {
    causal_attention(q, k, k, {}, NearTokens{window, normal({1, 2, tokens, 16}, 3), normal({1, 2, value_tokens, 16}, 4)});
  };
  EXPECT_NO_THROW(attend(8, 12, 12));
  EXPECT_NO_THROW(attend(1000, 30, 30));
  EXPECT_THROW(attend(0, 12, 12), std::invalid_argument);
  EXPECT_THROW(attend(8, 11, 11), std::invalid_argument);
  EXPECT_THROW(attend(8, 12, 13), std::invalid_argument);
  EXPECT_THROW(attend(8, 31, 31), std::invalid_argument);
}

TEST(FullCache, IsTrimmedCopiedAndRestored) {
  const Rope rope({}, 16);
  const AttentionSpec spec{.scale = 0.25f, .rope = &rope};
  const auto q = normal({2, 4, 90, 16}, 1), k = normal({2, 2, 90, 16}, 2), v = normal({2, 2, 90, 16}, 3);
  const auto append = [&](AttentionCache& cache, int begin, int end) {
    const auto cut = [&](const mx::array& x) { return mx::slice(x, {0, 0, begin, 0}, {2, x.shape(1), end, 16}); };
    return cache.attend(cut(q), cut(k), cut(v), spec);
  };
  FullCache cache, never, restored;
  append(cache, 0, 50), append(never, 0, 50);
  append(cache, 80, 90);
  EXPECT_EQ(cache.trim(10), 10);
  EXPECT_EQ(cache.offset(), 50);
  restored.restore(cache.state());
  const auto copy = cache.clone();
  const auto expected = append(never, 50, 60);
  for (auto* other : {static_cast<SavableCache*>(&cache), static_cast<SavableCache*>(&restored), copy.get()})
    EXPECT_TRUE(mx::array_equal(append(*other, 50, 60), expected).item<bool>());
  EXPECT_EQ(cache.trim(1000), 60);
  EXPECT_EQ(copy->offset(), 60);
  EXPECT_THROW(cache.restore({{"keys", k}}), std::invalid_argument);
}

}  // namespace
}  // namespace veloxquant
