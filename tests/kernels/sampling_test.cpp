#include "veloxquant/kernels/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "tests/kernels/every_target.h"

namespace veloxquant {
namespace {

using testing::normal_values;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::vector<float> uniform_values(std::size_t count, std::uint64_t seed) {
  Random random(seed);
  std::vector<float> values(count);
  for (auto& value : values) value = std::min(static_cast<float>(random.uniform()), std::nextafter(1.0f, 0.0f));
  return values;
}

std::vector<std::int32_t> sampled(const std::vector<float>& logits, const std::vector<float>& uniforms) {
  std::vector<std::int32_t> tokens(uniforms.size(), -1);
  sample_tokens(logits.data(), uniforms.data(), uniforms.size(), logits.size() / uniforms.size(), tokens.data());
  return tokens;
}

TEST(Sampling, EqualsReferenceAtOddSizes) {
  testing::for_each_target([] {
    for (const std::size_t vocabulary : {1, 2, 15, 17, 255, 256, 257, 8191, 8192}) {
      const std::size_t rows = 33;
      const auto logits = normal_values(rows * vocabulary, vocabulary, 3.0), uniforms = uniform_values(rows, vocabulary);
      std::vector<std::int32_t> expected(rows);
      reference::sample_tokens(logits.data(), uniforms.data(), rows, vocabulary, expected.data());
      EXPECT_EQ(sampled(logits, uniforms), expected) << vocabulary;
      std::vector<float> actual(logits.size()), score(logits.size());
      sampled_score(logits.data(), uniforms.data(), rows, vocabulary, actual.data());
      reference::sampled_score(logits.data(), uniforms.data(), rows, vocabulary, score.data());
      testing::expect_near(actual, score, 1e-6);
    }
  });
}

TEST(Sampling, ForbiddenTokensAreNeverDrawn) {
  testing::for_each_target([] {
    for (const std::size_t allowed : {0, 3, 299}) {
      std::vector<float> logits(300, -kInfinity);
      logits[allowed] = 1e3f;
      for (const float uniform : {0.0f, 0.5f, std::nextafter(1.0f, 0.0f)})
        EXPECT_EQ(sampled(logits, {uniform}), std::vector<std::int32_t>{static_cast<std::int32_t>(allowed)});
    }
  });
}

TEST(Sampling, DrawsEachTokenInProportion) {
  const std::size_t draws = 40000;
  const std::vector<double> probabilities = {0.5, 0.0, 0.25, 0.2, 0.05};
  std::vector<float> logits;
  for (std::size_t i = 0; i < draws; ++i)
    for (const double p : probabilities) logits.push_back(static_cast<float>(std::log(p)));
  const auto tokens = sampled(logits, uniform_values(draws, 9));
  for (std::size_t i = 0; i < probabilities.size(); ++i) {
    const double p = probabilities[i];
    const auto drawn = static_cast<double>(std::count(tokens.begin(), tokens.end(), static_cast<std::int32_t>(i)));
    EXPECT_NEAR(drawn / static_cast<double>(draws), p, 5 * std::sqrt(p * (1 - p) / static_cast<double>(draws)));
  }
}

TEST(Sampling, SameOnAnyThreads) {
  const auto logits = normal_values(50 * 700, 3), uniforms = uniform_values(50, 4);
  testing::expect_same_on_any_threads([&] {
    std::vector<float> score(logits.size());
    sampled_score(logits.data(), uniforms.data(), 50, 700, score.data());
    return score;
  });
}

}  // namespace
}  // namespace veloxquant
