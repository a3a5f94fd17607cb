#include "veloxquant/kernels/divergence.h"

#include <cmath>
#include <limits>

#include "tests/kernels/every_target.h"

namespace veloxquant {
namespace {

using testing::normal_values;

// Blocks of 256 terms are summed in float, without vectors one after the other: a relative error of 256 · 2⁻²⁵ / √256 and some.
constexpr double kAbsolute = 1e-7, kRelative = 3e-6;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

std::vector<Divergence> measured(const std::vector<float>& reference, const std::vector<float>& logits,
                                 const std::vector<std::int32_t>& targets) {
  std::vector<Divergence> out(targets.size());
  divergence(reference.data(), logits.data(), targets.data(), logits.size() / targets.size(), out);
  return out;
}

Divergence one(const std::vector<float>& reference, const std::vector<float>& logits, std::int32_t target = -1) {
  return measured(reference, logits, {target}).at(0);
}

// KL in long double, as Σ p·(e^δ − 1 − δ) with δ = log p̃ − log p: every term is positive, so that nothing cancels.
double exact_kl(const float* reference, const float* logits, std::size_t n) {
  const auto log_sum = [n](const float* x) {
    long double sum = 0;
    for (std::size_t i = 0; i < n; ++i) sum += std::exp(static_cast<long double>(x[i]));
    return std::log(sum);
  };
  const long double a = log_sum(reference), b = log_sum(logits);
  long double kl = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const long double log_p = reference[i] - a, delta = (logits[i] - b) - log_p;
    kl += std::exp(log_p) * (std::expm1(delta) - delta);
  }
  return static_cast<double>(kl);
}

std::vector<float> plus_noise(std::vector<float> x, double noise, std::uint64_t seed) {
  const auto added = normal_values(x.size(), seed, noise);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] += added[i];
  return x;
}

TEST(Divergence, EqualsReferenceAtOddSizes) {
  testing::for_each_target([] {
    for (const std::size_t vocabulary : {1, 2, 3, 7, 63, 64, 65, 129, 257, 1000}) {
      SCOPED_TRACE(vocabulary);
      constexpr std::size_t kRows = 19;
      const auto reference = normal_values(kRows * vocabulary, vocabulary, 3.0);
      const auto logits = plus_noise(reference, 0.5, vocabulary + 1);
      std::vector<std::int32_t> targets;
      for (std::size_t r = 0; r < kRows; ++r) targets.push_back(r % 4 == 3 ? -1 : static_cast<std::int32_t>(r * 31 % vocabulary));
      const auto actual = measured(reference, logits, targets);
      std::vector<Divergence> expected(kRows);
      reference::divergence(reference.data(), logits.data(), targets.data(), vocabulary, expected);
      for (std::size_t r = 0; r < kRows; ++r) {
        EXPECT_NEAR(actual[r].kl, expected[r].kl, kAbsolute + kRelative * expected[r].kl);
        EXPECT_NEAR(actual[r].cross_entropy, expected[r].cross_entropy, 1e-6 + 1e-6 * expected[r].cross_entropy);
        EXPECT_EQ(actual[r].top, expected[r].top);
      }
    }
  });
}

// The divergences that matter are small: what is left when terms of several nats cancel must still be right.
TEST(Divergence, SmallDivergencesAreAccurate) {
  constexpr std::size_t kVocabulary = 8192;
  testing::for_each_target([] {
    for (const double spread : {0.5, 2.0, 6.0}) {
      for (const double noise : {1e-4, 1e-3, 1e-2, 0.1}) {
        for (const float shift : {0.0f, 12.0f}) {  // of all logits: changes no distribution
          const auto reference = normal_values(kVocabulary, 1, spread);
          auto logits = plus_noise(reference, noise, 2);
          for (auto& logit : logits) logit += shift;
          const double expected = exact_kl(reference.data(), logits.data(), kVocabulary);
          const float kl = one(reference, logits).kl;
          EXPECT_GE(kl, 0.0f);
          EXPECT_NEAR(kl, expected, kAbsolute + kRelative * expected)
              << "spread " << spread << ", noise " << noise << ", shift " << shift;
        }
      }
    }
  });
}

TEST(Divergence, EqualRowsHaveNone) {
  const auto reference = normal_values(7 * 333, 1, 5.0);
  const std::vector<std::int32_t> no_targets(7, -1);
  testing::for_each_target([&] {
    for (const auto& row : measured(reference, std::vector<float>(reference), no_targets)) {
      EXPECT_EQ(row.kl, 0.0f);
      EXPECT_EQ(row.cross_entropy, 0.0f);
    }
  });
}

TEST(Divergence, TopIsTheLowestOfEqualOnes) {
  testing::for_each_target([] {
    std::vector<float> logits(77, -1.0f);
    EXPECT_EQ(one(logits, logits).top, 0);
    logits[76] = logits[41] = logits[40] = 2.0f;
    EXPECT_EQ(one(logits, logits).top, 40);
    logits[76] = 3.0f;
    EXPECT_EQ(one(logits, logits).top, 76);
  });
}

TEST(Divergence, ExtremeLogits) {
  testing::for_each_target([] {
    for (const std::size_t vocabulary : {5, 64}) {  // scalar tail and whole vectors
      SCOPED_TRACE(vocabulary);
      std::vector<float> reference(vocabulary, -1e4f), logits(vocabulary, -1e4f);
      reference[1] = 1e4f;
      logits[2] = 1e4f;
      EXPECT_EQ(one(reference, logits, 2).kl, 2e4f);
      EXPECT_EQ(one(reference, logits, 2).cross_entropy, 0.0f);
      EXPECT_EQ(one(reference, logits, 1).cross_entropy, 2e4f);
      EXPECT_EQ(one(reference, reference, 1).kl, 0.0f);
    }
  });
}

double probability(const std::vector<float>& logits, std::size_t token) {
  double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit));
  return std::exp(static_cast<double>(logits[token])) / sum;
}

// −∞ is how a token is forbidden.
TEST(Divergence, ForbiddenTokens) {
  testing::for_each_target([] {
    for (const std::size_t vocabulary : {5, 64}) {
      SCOPED_TRACE(vocabulary);
      const auto allowed = normal_values(vocabulary, 3);
      auto reference = allowed, logits = plus_noise(allowed, 0.1, 4);
      const std::vector<float> short_reference(reference.begin() + 1, reference.end()),
          short_logits(logits.begin() + 1, logits.end());
      const double expected = exact_kl(short_reference.data(), short_logits.data(), vocabulary - 1);
      reference[0] = -kInfinity;
      logits[0] = -kInfinity;
      EXPECT_NEAR(one(reference, logits).kl, expected, 2e-7) << "forbidden in both";
      EXPECT_EQ(one(reference, reference).kl, 0.0f);
      // Forbidden in the reference alone: −log of the mass that is left.
      EXPECT_NEAR(one(reference, allowed).kl, -std::log1p(-probability(allowed, 0)), 2e-7);
      EXPECT_EQ(one(allowed, logits).kl, kInfinity) << "forbidden although the reference has mass there";
    }
  });
}

TEST(Divergence, SameBitsOnAnyThreads) {
  const auto reference = normal_values(50 * 301, 1, 3.0), logits = plus_noise(reference, 0.2, 9);
  testing::expect_same_on_any_threads([&] {
    std::vector<float> flat;
    for (const auto& row : measured(reference, logits, std::vector<std::int32_t>(50, 7))) {
      flat.push_back(row.kl);
      flat.push_back(row.cross_entropy);
    }
    return flat;
  });
}

}  // namespace
}  // namespace veloxquant
