#include "veloxquant/evaluate/evaluate.h"

#include <gtest/gtest.h>

#include <cmath>

#include "mlx/memory.h"
#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "tests/model/demo_model.h"
#include "veloxquant/cache/restoring_cache.h"
#include "veloxquant/calibrate/observe.h"
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
// What evaluating one window takes at most, beyond the weights.
double peak_bytes(int length, const std::vector<Storage>& storages) {
  TokenBatch window(1, length);
  for (int t = 0; t < length; ++t) window.row(0)[static_cast<std::size_t>(t)] = t * 37 % demo_model().config().vocab_size;
  const std::size_t before = mx::get_active_memory();
  mx::reset_peak_memory();
  evaluate(demo_model(), window, storages, {});
  return static_cast<double>(mx::get_peak_memory() - before);
}

TEST(Evaluate, MemoryGrowsWithTheTokensOfOneLayer) {
  const std::vector<Storage> one = {peer_storage("kivi2+window", demo_model())};
  peak_bytes(64, one);  // weights are converted at first use
  // Nothing grows with the square of the tokens (4 heads' scores: 268 MB), nor with all 12 layers (their keys and values: 12 KiB a
  // token).
  const double small = peak_bytes(1024, one), large = peak_bytes(4096, one), by_token = (large - small) / 3072;
  EXPECT_LE(by_token, 16 << 10);
  // A storage more is its hidden states more.
  const double hidden = 4096.0 * sizeof(float) * demo_model().config().hidden_size;
  EXPECT_LE(peak_bytes(4096, std::vector<Storage>(4, one[0])) - large, 3.5 * hidden);
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
