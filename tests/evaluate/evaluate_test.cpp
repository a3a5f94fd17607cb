#include "veloxquant/evaluate/evaluate.h"

#include <gtest/gtest.h>

#include <cmath>

#include "mlx/memory.h"
#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "tests/model/demo_model.h"
#include "tests/temporary_folder.h"
#include "veloxquant/cache/restoring_cache.h"
#include "veloxquant/calibrate/make_plan.h"
#include "veloxquant/calibrate/observe.h"
#include "veloxquant/generate/generate.h"
#include "veloxquant/model/attention.h"

namespace veloxquant {
namespace {

using testing::demo_model;

std::vector<EvaluationRow> rows_of(const std::vector<std::string>& peers) {
  std::vector<Storage> storages;
  for (const auto& peer : peers) storages.push_back(peer_storage(peer, demo_model()));
  return evaluate(demo_model(), testing::text_samples(2, 128), storages, {});
}

TEST(Evaluate, FullPrecisionComesFirstAndLosesNothing) {
  const auto rows = rows_of({"mlx4"});
  ASSERT_EQ(rows.size(), 2u);
  EXPECT_EQ(rows[0].storage, "full");
  EXPECT_EQ(rows[0].kl_mean, 0);
  EXPECT_EQ(rows[0].top1, 1);
  EXPECT_FALSE(rows[0].recall.has_value());
  EXPECT_GT(rows[1].kl_mean, 0);
  EXPECT_GE(rows[1].kl_p999, rows[1].kl_mean);
}

// A measure that is no number is an error that names what was measured, not a row of a report.
// What running the model over one window takes at most, beyond the weights and before the logits, whose pieces are as large for
// any.
double peak_bytes(int length, const std::vector<Storage>& storages, const ScoringOptions& scoring = {}) {
  TokenBatch window(1, length);
  for (int t = 0; t < length; ++t) window.row(0)[static_cast<std::size_t>(t)] = t * 37 % demo_model().config().vocab_size;
  const std::size_t before = mx::get_active_memory();
  std::size_t peak = 0;
  mx::reset_peak_memory();
  const auto watch = [&](std::string_view stage, std::size_t, std::size_t) {
    if (stage == "scoring windows") peak = mx::get_peak_memory();
  };
  evaluate(demo_model(), window, storages, {}, watch, scoring);
  return static_cast<double>(peak - before);
}

TEST(Evaluate, MemoryGrowsWithTheTokensOfOneLayer) {
  const std::vector<Storage> one = {peer_storage("kivi2+window", demo_model())};
  peak_bytes(16, one);  // weights are converted at first use
  // One layer's activations are 23 KiB a token.  Scores of all tokens with all would add 20 KiB to that, the keys and values of all
  // 12 layers 12 KiB.
  const double small = peak_bytes(256, one), large = peak_bytes(1024, one);
  EXPECT_LE((large - small) / 768, 28 << 10);
  // A storage more is its hidden states more.
  const double hidden = 1024.0 * sizeof(float) * demo_model().config().hidden_size;
  EXPECT_LE(peak_bytes(1024, std::vector<Storage>(3, one[0])) - large, 2.5 * hidden);
}

// Besides full precision, which is read in one go, in steps there are the caches of all layers, which take 12 KiB a token, and grow
// by copies.
TEST(Evaluate, MemoryInStepsGrowsWithTheCaches) {
  const std::vector<Storage> one = {peer_storage("turboquant2+window", demo_model())};
  const auto peak = [&](int length) {
    ScoringOptions scoring;
    scoring.score_from = length - 32;
    scoring.step = 8;
    return peak_bytes(length, one, scoring);
  };
  peak(64);
  const double small = peak(1024), large = peak(2048);
  EXPECT_LE((large - small) / 1024, (28 + 2 * 12) << 10);
}

TEST(Evaluate, RefusesWhatIsNotFinite) {
  const Restore huge{[](const mx::array& x) { return mx::multiply(x, mx::array(1e38f)); }};
  const Storage storage{"huge", [huge](int) { return std::make_unique<RestoringCache>(huge, huge); }, [](int) { return 32.0; }};
  try {
    evaluate(demo_model(), testing::text_samples(1, 32), {&storage, 1}, {});
    ADD_FAILURE();
  } catch (const std::runtime_error& error) {
    EXPECT_NE(std::string(error.what()).find("huge: window 0: expected finite logits"), std::string::npos) << error.what();
  }
}

TEST(Evaluate, PerplexityIsThatOfTheText) {
  const auto samples = testing::text_samples(2, 128);
  double sum = 0;
  for (int i = 0; i < 2; ++i) {
    const auto logits =
        demo_model().logits(demo_model().forward(token_array(samples, i, i + 1), demo_model().make_caches(FullCache::factory())));
    const auto log_p = mx::subtract(logits, mx::logsumexp(logits, -1, true));
    mx::eval(log_p);
    for (int t = 0; t < 127; ++t) sum -= log_p.data<float>()[t * logits.shape(2) + samples.row(i)[static_cast<std::size_t>(t) + 1]];
  }
  EXPECT_NEAR(rows_of({})[0].perplexity, std::exp(sum / 254), 0.01);
}

std::vector<EvaluationRow> scored(const std::vector<Storage>& storages, const ScoringOptions& scoring, int count = 2,
                                  int length = 128) {
  return evaluate(demo_model(), testing::text_samples(count, length), storages, {}, {}, scoring);
}

TEST(Evaluate, ScoresFromAPositionOn) {
  constexpr int kFrom = 70;
  const auto samples = testing::text_samples(2, 128);
  double cross_entropy = 0, kl = 0;
  for (int i = 0; i < 2; ++i) {
    const auto log_p = [&](const CacheFactory& factory) {
      const auto logits =
          demo_model().logits(demo_model().forward(token_array(samples, i, i + 1), demo_model().make_caches(factory)));
      return mx::subtract(logits, mx::logsumexp(logits, -1, true));
    };
    const auto full = log_p(FullCache::factory()), stored = log_p(peer_storage("mlx2", demo_model()).factory);
    const auto each = mx::sum(mx::multiply(mx::exp(full), mx::subtract(full, stored)), -1);
    mx::eval(full, each);
    for (int t = kFrom; t < 127; ++t)
      cross_entropy -= full.data<float>()[t * full.shape(2) + samples.row(i)[static_cast<std::size_t>(t) + 1]];
    for (int t = kFrom; t < 128; ++t) kl += each.data<float>()[t];
  }
  const auto rows = scored({peer_storage("mlx2", demo_model())}, {.score_from = kFrom});
  EXPECT_NEAR(rows[0].perplexity, std::exp(cross_entropy / (2 * (127 - kFrom))), 0.01);
  EXPECT_NEAR(rows[1].kl_mean, kl / (2 * (128 - kFrom)), 1e-4);
}

// What is stored of a token is the same however many come at once, but for rounding; the reference is read in one go.
TEST(Evaluate, StepsAgreeWithOneGo) {
  const std::vector<Storage> storages = {full_storage(), peer_storage("mlx8", demo_model()),
                                         peer_storage("turboquant3+window", demo_model())};
  const auto at_once = scored(storages, {.score_from = 64});
  for (const int step : {1, 7, 1000}) {
    const auto in_steps = scored(storages, {.score_from = 64, .step = step});
    EXPECT_EQ(in_steps[0].perplexity, at_once[0].perplexity);
    EXPECT_LT(in_steps[1].kl_max, 1e-6);
    EXPECT_EQ(in_steps[1].top1, 1);
    EXPECT_NEAR(in_steps[1].perplexity, at_once[1].perplexity, 1e-3);
    // Codes are discontinuous: rounding moves a few of them (design.md, "Packed caches").
    for (const std::size_t s : {2u, 3u}) EXPECT_NEAR(in_steps[s].kl_mean / at_once[s].kl_mean, 1, 0.05) << in_steps[s].storage;
  }
}

// Beyond one chunk of the context, and without one.
TEST(Evaluate, StepsFollowAContextOfAnyLength) {
  TokenBatch window(1, kPromptChunk + 40);
  for (std::size_t t = 0; t < window.tokens.size(); ++t) window.tokens[t] = static_cast<std::int32_t>(t * 37 % 8192);
  const std::vector<Storage> full = {full_storage()};
  for (const int from : {0, kPromptChunk - 1, kPromptChunk, kPromptChunk + 30}) {
    const auto rows = evaluate(demo_model(), window, full, {}, {}, {.score_from = from, .step = 64});
    EXPECT_LT(rows[1].kl_max, 1e-6) << from;
  }
}

// Keys of KIVI's are coded 32 tokens together: a query of a window in one go sees what later tokens made of their group, one of a
// step does not.
TEST(Evaluate, StepsShowWhatGroupsOfTokensHide) {
  const std::vector<Storage> storages = {peer_storage("kivi2", demo_model())};
  const auto at_once = scored(storages, {.score_from = 64}), in_steps = scored(storages, {.score_from = 64, .step = 1});
  EXPECT_GT(std::abs(in_steps[1].kl_mean / at_once[1].kl_mean - 1), 0.02);
}

// The packed cache stores what the restoring one restores, in steps as at once; codes that four kernels of OpenBLAS round otherwise
// move the KL of so few positions by up to 10 %.
TEST(Evaluate, PackedPlansInSteps) {
  const auto samples = testing::text_samples(2, 128);
  Plan plan = make_plan(demo_model(), samples, {.method = "turboquant", .bits = 3.25});
  plan.window = 16, plan.sinks = 2;
  const std::vector<Storage> storages = {plan_storage("restored", plan), plan_storage("packed", plan, true)};
  const auto at_once = scored(storages, {.score_from = 40}), in_steps = scored(storages, {.score_from = 40, .step = 1});
  for (const auto* rows : {&at_once, &in_steps}) EXPECT_NEAR((*rows)[2].kl_mean / (*rows)[1].kl_mean, 1, 0.15);
  EXPECT_NEAR(in_steps[2].kl_mean / at_once[2].kl_mean, 1, 0.15);
}

TEST(Evaluate, RefusesScoringThatCannotBe) {
  const auto message = [](const ScoringOptions& scoring, int length = 128) {
    return testing::message_of<std::invalid_argument>([&] { scored({}, scoring, 1, length); });
  };
  EXPECT_EQ(message({.score_from = 127}), "[evaluate] score_from: expected 0 to 126 in windows of 128 tokens, got 127");
  EXPECT_EQ(message({.score_from = -1}), "[evaluate] score_from: expected 0 to 126 in windows of 128 tokens, got -1");
  EXPECT_EQ(message({.step = -1}), "[evaluate] step: expected at least 1 token, or 0 for windows in one go, got -1");
  EXPECT_EQ(message({}, 1), "[evaluate] expected windows of at least 2 tokens, got 1");
  EXPECT_EQ(scored({}, {.score_from = 126}).size(), 1u);
}

// Full precision, and infinite from token 20 on.
class BreakingCache : public FullCache {
 public:
  mx::array attend(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionSpec& spec) override {
    const auto positions = mx::arange(offset(), offset() + q.shape(2));
    const auto broken = mx::reshape(mx::greater_equal(positions, mx::array(20)), {1, 1, q.shape(2), 1});
    return mx::where(broken, mx::array(1e38f), FullCache::attend(q, k, v, spec));
  }
};

TEST(Evaluate, NamesThePositionThatIsNotFinite) {
  // In the last layer, so that no attention spreads it to positions before.
  const CacheFactory factory = [](int layer) -> std::unique_ptr<AttentionCache> {
    if (layer < demo_model().config().num_layers - 1) return std::make_unique<FullCache>();
    return std::make_unique<BreakingCache>();
  };
  const Storage storage{"breaks", factory, [](int) { return 32.0; }};
  for (const ScoringOptions& scoring : std::vector<ScoringOptions>{{}, {.score_from = 12}, {.score_from = 12, .step = 3}}) {
    const auto message = testing::message_of<std::runtime_error>([&] { scored({storage}, scoring, 1, 32); });
    EXPECT_NE(message.find("breaks: window 0: expected finite logits"), std::string::npos) << message;
    EXPECT_NE(message.find("at position 20:"), std::string::npos) << message;
  }
}

// Statistics are of windows in their order, and differences of rows.
TEST(Evaluate, RowsCarryErrorsAndDifferences) {
  const auto rows = scored({peer_storage("mlx4", demo_model()), peer_storage("mlx2", demo_model())}, {}, 2, 100);
  const auto first = evaluate(demo_model(), testing::text_samples(2, 100), {}, {});
  EXPECT_EQ(first[0].error->kl_mean, 0);
  for (std::size_t i = 0; i < 3; ++i) {
    ASSERT_EQ(rows[i].differences.size(), 3u);
    for (std::size_t j = 0; j < 3; ++j) EXPECT_DOUBLE_EQ(rows[i].differences[j].value.kl_mean, rows[i].kl_mean - rows[j].kl_mean);
    EXPECT_NEAR(rows[i].differences[0].value.perplexity, rows[i].perplexity_change, 1e-9);
    EXPECT_LE(rows[i].kl_median, rows[i].kl_p99);
    EXPECT_LE(rows[i].kl_p99, rows[i].kl_p999);
    EXPECT_LE(rows[i].kl_p999, rows[i].kl_max);
  }
  EXPECT_GT(rows[2].error->kl_mean, 0);
  EXPECT_FALSE(scored({}, {}, 1)[0].error.has_value());
}

TEST(Evaluate, MoreBitsLoseLess) {
  const auto rows = rows_of({"mlx2", "mlx3", "mlx4", "mlx5", "mlx6", "mlx8"});
  for (std::size_t i = 2; i < rows.size(); ++i) EXPECT_LT(rows[i].kl_mean, rows[i - 1].kl_mean) << rows[i].storage;
  for (const char* family : {"kivi", "turboquant"}) {
    const auto peers =
        rows_of({std::string(family) + "1", std::string(family) + "2", std::string(family) + "3", std::string(family) + "4"});
    for (std::size_t i = 2; i < peers.size(); ++i) EXPECT_LT(peers[i].kl_mean, peers[i - 1].kl_mean) << peers[i].storage;
  }
}

TEST(Evaluate, EffectiveBitsOfPeers) {
  const auto bits = [](const std::string& name, int context) { return peer_storage(name, demo_model()).effective_bits(context); };
  for (const int context : {1, 100, 2048}) {
    EXPECT_DOUBLE_EQ(bits("mlx4", context), 4.5);
    EXPECT_DOUBLE_EQ(bits("turboquant2", context), 2.25);
  }
  EXPECT_DOUBLE_EQ(bits("kivi2", 2048), 3.0);
  EXPECT_DOUBLE_EQ(bits("kivi2", 8), (2 + 32.0 / 8 + 3) / 2);  // keys: minimum and step for 8 tokens instead of 32
  EXPECT_DOUBLE_EQ(bits("mlx4+window", 36), 8.5);
  EXPECT_DOUBLE_EQ(bits("mlx4+window", 2048), (36 * 8.5 + 2012 * 4.5) / 2048);
  EXPECT_DOUBLE_EQ(bits("kivi2+window", 32768), (36 * 8.5 + (2 * 32732 + 1023 * 32 + 3 * 32732) / 2.0) / 32768);
  for (const char* name : {"mlx7", "", "+window", "mlx4+", "mlx4+window+window", "vecinfer2+window", "vecinfer3"})
    EXPECT_THROW(peer_storage(name, demo_model()), std::invalid_argument) << name;
}

TEST(Evaluate, WindowedBits) {
  const auto two = [](int) { return 2.0; };
  EXPECT_DOUBLE_EQ(windowed_bits(two, 8.5, 10, 36), 8.5);
  EXPECT_DOUBLE_EQ(windowed_bits(two, 8.5, 36, 36), 8.5);
  EXPECT_DOUBLE_EQ(windowed_bits(two, 8.5, 72, 36), 5.25);
  EXPECT_DOUBLE_EQ(windowed_bits(two, 8.5, 72, 0), 2);
  EXPECT_DOUBLE_EQ(windowed_bits([](int coded) { return coded / 10.0; }, 8, 40, 20), 5);  // those of the coded tokens alone
}

// Every name is made by its own row of the table.
TEST(Evaluate, PeersHaveTheirNames) {
  const auto names = peer_names();
  EXPECT_EQ(names.size(), 17u + 14u);
  for (const auto& name : names) {
    if (name.starts_with("vecinfer")) continue;
    const auto storage = peer_storage(name, demo_model());
    EXPECT_EQ(storage.name, name);
    EXPECT_EQ(storage.constant_bytes, 0u);
  }
}

// VecInfer learns: the same each time, on a text of its own.
TEST(Evaluate, VecInferIsAPeer) {
  const Storage storage = peer_storage("vecinfer2", demo_model());
  const auto& config = demo_model().config();
  EXPECT_DOUBLE_EQ(storage.effective_bits(2048), 2);
  const int codebooks = 2 * config.num_layers * 256 * config.head_dim, smooth_factors = config.num_layers * config.head_dim;
  EXPECT_EQ(storage.constant_bytes, sizeof(float) * static_cast<std::size_t>(codebooks + smooth_factors));
  const auto rows = evaluate(demo_model(), testing::text_samples(2, 128), {&storage, 1}, {});
  EXPECT_EQ(rows[1].constant_bytes, storage.constant_bytes);
  EXPECT_GT(rows[1].kl_mean, 0.05);
  EXPECT_LT(rows[1].kl_mean, 1);
}

TEST(Evaluate, FactsAreAskedFor) {
  const auto filler = testing::demo_tokenizer().encode(testing::kText);
  std::vector<std::int32_t> text;
  while (text.size() < 600) text.insert(text.end(), filler.begin(), filler.end());
  const RecallDocuments documents{make_recall_documents(testing::demo_tokenizer(), text, 6, 512, 1),
                                  make_recall_documents(testing::demo_tokenizer(), text, 6, 512, 1, Wording::kSecond)};
  const std::vector<Storage> storages = {peer_storage("mlx8", demo_model()), peer_storage("turboquant1", demo_model())};
  const auto rows = evaluate(demo_model(), testing::text_samples(1, 64), storages, documents);
  EXPECT_GT(rows[0].recall.value(), 0.6);
  EXPECT_NEAR(rows[1].recall.value(), rows[0].recall.value(), 0.15);
  EXPECT_LT(rows[2].recall.value(), 0.2);
  EXPECT_GT(rows[0].recall_second.value(), 0.3);
  EXPECT_NEAR(rows[1].recall_second.value(), rows[0].recall_second.value(), 0.15);
  EXPECT_LT(rows[2].recall_second.value(), 0.2);
}

}  // namespace
}  // namespace veloxquant
