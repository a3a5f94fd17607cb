#include "veloxquant/calibrate/gradients.h"

#include <gtest/gtest.h>

#include <cmath>

#include "mlx/ops.h"
#include "mlx/random.h"
#include "mlx/transforms.h"
#include "tests/model/demo_model.h"
#include "veloxquant/calibrate/observe.h"
#include "veloxquant/model/attention.h"
#include "veloxquant/model/cpu_operation.h"
#include "veloxquant/model/sampling.h"

namespace veloxquant {
namespace {

using testing::demo_model;

constexpr std::uint64_t kSeed = 3;

mx::array some_tokens(int sequences, int length) {
  return token_array(testing::text_samples(sequences, length), 0, sequences);
}

// Attends to keys (before RoPE) and values that are moved by an error, where there is one.
class MovingCache : public AttentionCache {
 public:
  MovingCache(std::optional<mx::array> keys, std::optional<mx::array> values)
      : keys_(std::move(keys)), values_(std::move(values)) {}

  mx::array attend(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionSpec& spec) override {
    offset_ = k.shape(2);
    const auto moved = [](const mx::array& x, const std::optional<mx::array>& error) { return error ? mx::add(x, *error) : x; };
    return causal_attention((*spec.rope)(q, 0), (*spec.rope)(moved(k, keys_), 0), moved(v, values_), spec);
  }
  int offset() const override { return offset_; }
  std::size_t nbytes() const override { return 0; }

 private:
  std::optional<mx::array> keys_, values_;
  int offset_ = 0;
};

mx::array logits_with(const mx::array& tokens, int layer, const std::optional<mx::array>& keys,
                      const std::optional<mx::array>& values) {
  const auto caches = demo_model().make_caches(
      [&](int i) { return std::make_unique<MovingCache>(i == layer ? keys : std::nullopt, i == layer ? values : std::nullopt); });
  const auto logits = demo_model().logits(demo_model().forward(tokens, caches));
  return mx::reshape(logits, {-1, logits.shape(-1)});
}

mx::array drawn_tokens(const mx::array& logits, std::uint64_t seed) {
  return sample_tokens(logits, mx::random::uniform({logits.shape(0)}, mx::float32, mx::random::key(seed)));
}

TEST(Gradients, EqualThoseOfMlxOperations) {
  const auto tokens = some_tokens(2, 48);
  const auto clean = logits_with(tokens, -1, std::nullopt, std::nullopt);
  // MLX may draw another token where two are equally near (tests/model/sampling_test.cpp), and then has other gradients.
  std::uint64_t seed = 0;
  for (;; ++seed) {
    const auto ours = drawn_tokens(clean, seed);
    mx::eval(ours);
    const MlxOperationsScope scope;
    if (mx::array_equal(ours, drawn_tokens(clean, seed)).item<bool>()) break;
    ASSERT_LT(seed, 20u);
  }
  const auto ours = likelihood_gradients(demo_model(), tokens, seed);
  const MlxOperationsScope scope;
  const auto theirs = likelihood_gradients(demo_model(), tokens, seed);
  ASSERT_EQ(ours.size(), theirs.size());
  const auto compare = [](const mx::array& a, const mx::array& b) {
    ASSERT_EQ(a.shape(), b.shape());
    const float largest = mx::max(mx::abs(b)).item<float>();
    EXPECT_GT(largest, 0.0f);
    EXPECT_LE(mx::max(mx::abs(mx::subtract(a, b))).item<float>(), 2e-4f * largest);
  };
  for (std::size_t layer = 0; layer < ours.size(); ++layer) {
    SCOPED_TRACE(layer);
    compare(ours[layer].keys, theirs[layer].keys);
    compare(ours[layer].values, theirs[layer].values);
  }
}

// The likelihood of the very tokens that were drawn, along a step in the direction of a gradient.
TEST(Gradients, AreTheSlopeOfTheLikelihood) {
  const auto tokens = some_tokens(1, 48);
  const auto gradients = likelihood_gradients(demo_model(), tokens, kSeed);
  const auto clean = logits_with(tokens, -1, std::nullopt, std::nullopt);
  const auto drawn = mx::expand_dims(drawn_tokens(clean, kSeed), -1);
  const auto likelihood = [&](const mx::array& logits) {
    const auto log_p = mx::subtract(logits, mx::logsumexp(logits, -1, true));
    return static_cast<double>(mx::sum(mx::take_along_axis(log_p, drawn, -1)).item<float>());
  };
  for (const int layer : {0, 5, 11}) {
    for (const bool keys : {true, false}) {
      SCOPED_TRACE(::testing::Message() << "layer " << layer << (keys ? " keys" : " values"));
      const auto& gradient =
          keys ? gradients[static_cast<std::size_t>(layer)].keys : gradients[static_cast<std::size_t>(layer)].values;
      const double square = mx::sum(mx::square(gradient)).item<float>();
      const auto step = static_cast<float>(0.05 / std::sqrt(square));
      const auto at = [&](float size) {
        const auto error = mx::multiply(gradient, mx::array(size));
        return likelihood(
            logits_with(tokens, layer, keys ? std::optional(error) : std::nullopt, keys ? std::nullopt : std::optional(error)));
      };
      EXPECT_NEAR((at(step) - at(-step)) / (2 * step * square), 1.0, 0.03);
    }
  }
}

TEST(Gradients, SameSeedSameGradients) {
  const auto tokens = some_tokens(1, 32);
  const auto first = likelihood_gradients(demo_model(), tokens, 1), again = likelihood_gradients(demo_model(), tokens, 1),
             other = likelihood_gradients(demo_model(), tokens, 2);
  EXPECT_TRUE(mx::array_equal(first[4].keys, again[4].keys).item<bool>());
  EXPECT_FALSE(mx::array_equal(first[4].keys, other[4].keys).item<bool>());
}

}  // namespace
}  // namespace veloxquant
