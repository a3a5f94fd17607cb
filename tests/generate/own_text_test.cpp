#include "veloxquant/generate/own_text.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "tests/model/demo_model.h"
#include "veloxquant/calibrate/observe.h"
#include "veloxquant/model/attention.h"
#include "veloxquant/model/divergence.h"

namespace veloxquant {
namespace {

using testing::demo_model;

TEST(OwnText, SameSeedSameText) {
  const auto first = generate_own_text(demo_model(), 3, 24, 7), again = generate_own_text(demo_model(), 3, 24, 7);
  EXPECT_EQ(first.tokens, again.tokens);
  EXPECT_NE(first.tokens, generate_own_text(demo_model(), 3, 24, 8).tokens);
  EXPECT_FALSE(std::equal(first.row(0).begin(), first.row(0).end(), first.row(1).begin()));
}

TEST(OwnText, StartsWithTheBeginOfText) {
  const auto samples = generate_own_text(demo_model(), 2, 8, 1);
  for (int i = 0; i < 2; ++i) EXPECT_EQ(samples.row(i)[0], demo_model().config().bos_token_id.value());
  for (const auto token : samples.tokens) EXPECT_TRUE(token >= 0 && token < demo_model().config().vocab_size);
}

// A text drawn from the model has the cross-entropy that the model expects of it: its mean entropy.
TEST(OwnText, IsDrawnAtTemperatureOne) {
  const auto samples = generate_own_text(demo_model(), 16, 128, 3);
  double cross_entropy = 0, entropy = 0;
  int positions = 0;
  for (int i = 0; i < samples.count; ++i) {
    const auto hidden = demo_model().forward(token_array(samples, i, i + 1), demo_model().make_caches(FullCache::factory()));
    const auto logits = demo_model().logits(hidden);
    mx::array log_p = mx::subtract(logits, mx::logsumexp(logits, -1, true));
    const auto row_entropy = mx::negative(mx::sum(mx::multiply(mx::exp(log_p), log_p), -1));
    mx::eval(log_p, row_entropy);
    const int vocabulary = logits.shape(2);
    for (int t = 0; t + 1 < samples.length; ++t, ++positions) {
      cross_entropy -= log_p.data<float>()[t * vocabulary + samples.row(i)[static_cast<std::size_t>(t) + 1]];
      entropy += row_entropy.data<float>()[t];
    }
  }
  // Standard error of the mean of 2,032 draws whose deviation is about 2.5 nats: 0.06.
  EXPECT_NEAR(cross_entropy / positions, entropy / positions, 0.25);
}

TEST(OwnText, BadCounts) {
  EXPECT_THROW(generate_own_text(demo_model(), 0, 8, 0), std::invalid_argument);
  EXPECT_THROW(generate_own_text(demo_model(), 1, 0, 0), std::invalid_argument);
  EXPECT_THROW(generate_own_text(demo_model(), 1, demo_model().config().max_position_embeddings + 1, 0), std::invalid_argument);
}

TEST(OwnText, StopsWhenInterrupted) {
  int calls = 0;
  const ProgressCallback stop = [&](std::string_view, std::size_t, std::size_t) {
    if (++calls == 3) throw Interrupted();
  };
  EXPECT_THROW(generate_own_text(demo_model(), 1, 100, 0, stop), Interrupted);
}

}  // namespace
}  // namespace veloxquant
