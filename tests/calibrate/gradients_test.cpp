#include "veloxquant/calibrate/gradients.h"

#include <gtest/gtest.h>

#include <cmath>

#include "mlx/ops.h"
#include "mlx/random.h"
#include "mlx/transforms.h"
#include "tests/model/demo_model.h"
#include "veloxquant/calibrate/observe.h"
#include "veloxquant/core/random.h"
#include "veloxquant/model/attention.h"
#include "veloxquant/model/cpu_operation.h"
#include "veloxquant/model/sampling.h"

namespace veloxquant {
namespace {

using testing::demo_model;

constexpr std::uint64_t kSeed = 3;

// Of all layers and samples together, keys and values in turn: [layer] → [B, H, T, D].
struct AllGradients {
  std::vector<std::optional<mx::array>> keys, values;
};

AllGradients all_gradients(const TokenBatch& samples, const GradientOptions& options) {
  std::vector<std::vector<mx::array>> keys(12), values(12);
  likelihood_gradients(demo_model(), samples, options, [&](const LayerGradients& step) {
    keys.at(static_cast<std::size_t>(step.layer)).push_back(step.key_gradients);
    values.at(static_cast<std::size_t>(step.layer)).push_back(step.value_gradients);
  });
  AllGradients all;
  for (std::size_t layer = 0; layer < keys.size(); ++layer) {
    all.keys.push_back(mx::concatenate(keys[layer], 0));
    all.values.push_back(mx::concatenate(values[layer], 0));
  }
  return all;
}

mx::array all_tokens(const TokenBatch& samples) {
  return token_array(samples, 0, samples.count);
}

// What likelihood_gradients seeds the draws of its first few samples with.
std::uint64_t draw_seed(std::uint64_t seed) {
  return Random(seed, 0).next();
}

// Attends to keys (before RoPE) and values that are moved by an error, where there is one; not those of the window.
class MovingCache : public AttentionCache {
 public:
  MovingCache(std::optional<mx::array> keys, std::optional<mx::array> values, int window)
      : keys_(std::move(keys)), values_(std::move(values)), window_(window) {}

  mx::array attend(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionSpec& spec) override {
    offset_ = k.shape(2);
    const auto moved = [](const mx::array& x, const std::optional<mx::array>& error) { return error ? mx::add(x, *error) : x; };
    std::optional<NearTokens> near;
    if (window_ > 0) near = NearTokens{window_, (*spec.rope)(k, 0), v};
    return causal_attention((*spec.rope)(q, 0), (*spec.rope)(moved(k, keys_), 0), moved(v, values_), spec, near);
  }
  int offset() const override { return offset_; }
  std::size_t nbytes() const override { return 0; }

 private:
  std::optional<mx::array> keys_, values_;
  int window_, offset_ = 0;
};

mx::array logits_with(const mx::array& tokens, int layer, const std::optional<mx::array>& keys,
                      const std::optional<mx::array>& values, int window = 0) {
  const auto caches = demo_model().make_caches([&](int i) {
    return std::make_unique<MovingCache>(i == layer ? keys : std::nullopt, i == layer ? values : std::nullopt, window);
  });
  const auto logits = demo_model().logits(demo_model().forward(tokens, caches));
  return mx::reshape(logits, {-1, logits.shape(-1)});
}

mx::array drawn_tokens(const mx::array& logits, std::uint64_t seed) {
  return sample_tokens(logits, mx::random::uniform({logits.shape(0)}, mx::float32, mx::random::key(seed)));
}

TEST(Gradients, EqualThoseOfMlxOperations) {
  const auto samples = testing::text_samples(2, 48);
  const auto clean = logits_with(all_tokens(samples), -1, std::nullopt, std::nullopt);
  // MLX may draw another token where two are equally near (tests/model/sampling_test.cpp), and then has other gradients.
  std::uint64_t seed = 0;
  for (;; ++seed) {
    const auto ours = drawn_tokens(clean, draw_seed(seed));
    mx::eval(ours);
    const MlxOperationsScope scope;
    if (mx::array_equal(ours, drawn_tokens(clean, draw_seed(seed))).item<bool>()) break;
    ASSERT_LT(seed, 20u);
  }
  const auto compare = [](const mx::array& a, const mx::array& b) {
    ASSERT_EQ(a.shape(), b.shape());
    const float largest = mx::max(mx::abs(b)).item<float>();
    EXPECT_GT(largest, 0.0f);
    EXPECT_LE(mx::max(mx::abs(mx::subtract(a, b))).item<float>(), 2e-4f * largest);
  };
  for (const int window : {0, 8}) {
    const auto ours = all_gradients(samples, {.window = window, .weights = {}, .seed = seed});
    const MlxOperationsScope scope;
    const auto theirs = all_gradients(samples, {.window = window, .weights = {}, .seed = seed});
    for (std::size_t layer = 0; layer < ours.keys.size(); ++layer) {
      SCOPED_TRACE(::testing::Message() << "layer " << layer << " window " << window);
      compare(*ours.keys[layer], *theirs.keys[layer]);
      compare(*ours.values[layer], *theirs.values[layer]);
    }
  }
}

// The weighted likelihood of the very tokens that were drawn, along a step in the direction of a gradient.
TEST(Gradients, AreTheSlopeOfTheLikelihood) {
  const auto samples = testing::text_samples(1, 48);
  const auto tokens = all_tokens(samples);
  const auto drawn = mx::expand_dims(drawn_tokens(logits_with(tokens, -1, std::nullopt, std::nullopt), draw_seed(kSeed)), -1);
  std::vector<float> weights(48, 1.0f);
  for (std::size_t t = 0; t < weights.size(); t += 5) weights[t] = static_cast<float>(t);
  for (const bool weighted : {false, true}) {
    for (const int window : {0, 6}) {
      const auto gradients =
          all_gradients(samples, {.window = window, .weights = weighted ? weights : std::vector<float>(), .seed = kSeed});
      const auto factors = weighted ? mx::sqrt(mx::array(weights.data(), {48, 1})) : mx::array(1.0f);
      const auto likelihood = [&](const mx::array& logits) {
        const auto log_p = mx::subtract(logits, mx::logsumexp(logits, -1, true));
        return static_cast<double>(mx::sum(mx::multiply(mx::take_along_axis(log_p, drawn, -1), factors)).item<float>());
      };
      for (const int layer : {0, 5, 11}) {
        for (const bool keys : {true, false}) {
          SCOPED_TRACE(::testing::Message() << "layer " << layer << (keys ? " keys" : " values") << " window " << window
                                            << (weighted ? " weighted" : ""));
          const auto& gradient = *(keys ? gradients.keys : gradients.values)[static_cast<std::size_t>(layer)];
          const double square = mx::sum(mx::square(gradient)).item<float>();
          const auto step = static_cast<float>(0.05 / std::sqrt(square));
          const auto at = [&](float size) {
            const auto error = mx::multiply(gradient, mx::array(size));
            return likelihood(logits_with(tokens, layer, keys ? std::optional(error) : std::nullopt,
                                          keys ? std::nullopt : std::optional(error), window));
          };
          EXPECT_NEAR((at(step) - at(-step)) / (2 * step * square), 1.0, 0.04);
        }
      }
    }
  }
}

// Tokens that only ever stand in the window cannot cost anything.
TEST(Gradients, NothingIsLostOfWhatStaysExact) {
  const auto gradients = all_gradients(testing::text_samples(1, 40), {.window = 10, .weights = {}, .seed = 1});
  const auto last = mx::slice(*gradients.keys[3], {0, 0, 30, 0}, {1, 2, 40, 64});
  EXPECT_EQ(mx::max(mx::abs(last)).item<float>(), 0.0f);
  const auto far = mx::slice(*gradients.keys[3], {0, 0, 0, 0}, {1, 2, 30, 64});
  EXPECT_GT(mx::max(mx::abs(far)).item<float>(), 0.0f);
}

TEST(Gradients, SameSeedSameGradients) {
  const auto samples = testing::text_samples(1, 32);
  const auto of = [&](std::uint64_t seed) { return *all_gradients(samples, {.weights = {}, .seed = seed}).keys[4]; };
  EXPECT_TRUE(mx::array_equal(of(1), of(1)).item<bool>());
  EXPECT_FALSE(mx::array_equal(of(1), of(2)).item<bool>());
}

TEST(Gradients, BadWeights) {
  const auto samples = testing::text_samples(1, 8);
  for (const auto& weights : {std::vector<float>(7, 1.0f), std::vector<float>(8, -1.0f)})
    EXPECT_THROW(all_gradients(samples, {.weights = weights, .seed = 0}), std::invalid_argument);
}

}  // namespace
}  // namespace veloxquant
