#include "veloxquant/generate/generate.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "mlx/ops.h"
#include "tests/model/demo_model.h"
#include "veloxquant/core/random.h"
#include "veloxquant/model/attention.h"

namespace veloxquant {
namespace {

using testing::demo_model;
using testing::demo_tokenizer;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

TEST(ChooseToken, DrawsAsTheModelSays) {
  const std::vector<float> logits = {std::log(0.5f), std::log(0.3f), std::log(0.15f), std::log(0.05f)};
  const auto shares = [&](double temperature, double top_p) {
    std::map<int, double> shares;
    Random random(1);
    constexpr int kDraws = 20000;
    for (int i = 0; i < kDraws; ++i) shares[choose_token(logits, temperature, top_p, random.uniform())] += 1.0 / kDraws;
    return shares;
  };
  EXPECT_EQ(choose_token(logits, 0, 1, 0.99), 0);
  auto all = shares(1, 1);
  EXPECT_NEAR(all[0], 0.5, 0.015);
  EXPECT_NEAR(all[3], 0.05, 0.01);
  auto some = shares(1, 0.75);  // 0.5 and 0.3 have it together
  EXPECT_EQ(some.size(), 2u);
  EXPECT_NEAR(some[0], 0.625, 0.015);
  auto cold = shares(0.5, 1);  // squares
  EXPECT_NEAR(cold[0], 0.25 / 0.365, 0.015);
}

TEST(Generate, TheLikeliestTokenFollows) {
  const auto prompt = demo_tokenizer().encode("It was a cold evening in November, and the rain");
  const auto made = generate(demo_model(), prompt, FullCache::factory(), {.max_tokens = 12});
  ASSERT_EQ(made.tokens.size(), 12u);
  EXPECT_EQ(made.tokens_in_cache, static_cast<int>(prompt.size()) + 11);
  // In one go, teacher-forced.
  auto all = prompt;
  all.insert(all.end(), made.tokens.begin(), made.tokens.end());
  const int length = static_cast<int>(all.size());
  const auto logits = demo_model().logits(
      demo_model().forward(mx::array(all.data(), {1, length}, mx::int32), demo_model().make_caches(FullCache::factory())));
  auto top = mx::argmax(logits, -1);
  top.eval();
  for (std::size_t i = 0; i < made.tokens.size(); ++i)
    EXPECT_EQ(static_cast<std::int32_t>(top.data<std::uint32_t>()[prompt.size() - 1 + i]), made.tokens[i]);
}

TEST(Generate, StopsWhereItShould) {
  const auto prompt = demo_tokenizer().encode("It was a cold evening");
  const auto free = generate(demo_model(), prompt, FullCache::factory(), {.max_tokens = 6});
  const auto stopped = generate(demo_model(), prompt, FullCache::factory(), {.max_tokens = 6, .stop_tokens = {free.tokens[3]}});
  EXPECT_TRUE(stopped.stopped);
  EXPECT_LE(stopped.tokens.size(), 3u);
  int seen = 0;
  const auto broken =
      generate(demo_model(), prompt, FullCache::factory(), {.max_tokens = 6}, [&](std::int32_t) { return ++seen < 2; });
  EXPECT_EQ(broken.tokens.size(), 2u);
  const auto drawn = [&] {
    return generate(demo_model(), prompt, FullCache::factory(), {.max_tokens = 8, .temperature = 1, .seed = 5}).tokens;
  };
  EXPECT_EQ(drawn(), drawn());
}

TEST(Generate, ReportsWhatItReadsAndStopsThere) {
  const auto text = testing::text_samples(1, 300);
  const std::vector<std::int32_t> some(text.tokens.begin(), text.tokens.begin() + 300);
  std::vector<std::int32_t> prompt;
  for (int i = 0; i < 2; ++i) prompt.insert(prompt.end(), some.begin(), some.end());  // two chunks
  const std::size_t layers = static_cast<std::size_t>(demo_model().config().num_layers);
  std::vector<std::size_t> reports;
  const auto made = generate(demo_model(), prompt, FullCache::factory(), {.max_tokens = 2}, {},
                             [&](std::string_view stage, std::size_t done, std::size_t total) {
                               EXPECT_EQ(stage, "reading the prompt");
                               EXPECT_EQ(total, prompt.size() * layers);
                               reports.push_back(done);
                             });
  ASSERT_EQ(reports.size(), 1 + 2 * layers);
  EXPECT_EQ(reports[1], 512u);
  EXPECT_EQ(reports.back(), prompt.size() * layers);
  EXPECT_EQ(made.kernels, std::vector<std::string>(layers, "cpu"));
  int left = 3;
  EXPECT_THROW(generate(demo_model(), prompt, FullCache::factory(), {}, {},
                        [&](std::string_view, std::size_t, std::size_t) {
                          if (--left == 0) throw Interrupted();
                        }),
               Interrupted);
}

TEST(Generate, BadInput) {
  const std::vector<std::int32_t> none, odd = {1, 1 << 20}, fine = {1};
  const auto run = [](const std::vector<std::int32_t>& prompt, const GenerateOptions& options) {
    return [=] { generate(demo_model(), prompt, FullCache::factory(), options); };
  };
  EXPECT_THAT(run(none, {}), ThrowsMessage<std::invalid_argument>(HasSubstr("prompt: expected at least one token")));
  EXPECT_THAT(run(odd, {}), ThrowsMessage<std::invalid_argument>(HasSubstr("got 1048576")));
  EXPECT_THAT(run(fine, {.max_tokens = 0}), ThrowsMessage<std::invalid_argument>(HasSubstr("max_tokens")));
  EXPECT_THAT(run(fine, {.temperature = -1}), ThrowsMessage<std::invalid_argument>(HasSubstr("temperature")));
  EXPECT_THAT(run(fine, {.top_p = 0}), ThrowsMessage<std::invalid_argument>(HasSubstr("top_p")));
}

}  // namespace
}  // namespace veloxquant
