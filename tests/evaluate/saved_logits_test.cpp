#include "veloxquant/evaluate/saved_logits.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "tests/model/demo_model.h"
#include "tests/temporary_folder.h"
#include "veloxquant/calibrate/observe.h"
#include "veloxquant/core/hash.h"
#include "veloxquant/core/safetensors.h"
#include "veloxquant/evaluate/evaluate.h"
#include "veloxquant/model/attention.h"

namespace veloxquant {
namespace {

using testing::demo_model;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

constexpr int kWindows = 2, kLength = 96, kFrom = 20;

TokenBatch windows() {
  return testing::text_samples(kWindows, kLength);
}

std::vector<Storage> storages() {
  std::vector<Storage> storages = {full_storage()};
  for (const char* name : {"mlx8", "mlx4", "kivi2+window", "turboquant1"}) storages.push_back(peer_storage(name, demo_model()));
  return storages;
}

std::vector<EvaluationRow> rows_of(const ScoringOptions& scoring) {
  return evaluate(demo_model(), windows(), storages(), {}, {}, scoring);
}

ScoringOptions from(int position) {
  ScoringOptions scoring;
  scoring.score_from = position;
  return scoring;
}

const SavedLogits& saved() {
  static const SavedLogits logits = [] {
    SavedLogits made;
    ScoringOptions scoring = from(kFrom);
    scoring.save = &made;
    evaluate(demo_model(), windows(), {}, {}, {}, scoring);
    return made;
  }();
  return logits;
}

std::vector<EvaluationRow> rows_by_saved(int position, const SavedLogits& logits = saved()) {
  ScoringOptions scoring = from(position);
  scoring.logits = &logits;
  return rows_of(scoring);
}

// log p of a window at full precision, [length, vocab_size].
std::vector<double> log_probabilities(int window) {
  const auto tokens = token_array(windows(), window, window + 1);
  auto logits = demo_model().logits(demo_model().forward(tokens, demo_model().make_caches(FullCache::factory())));
  mx::eval(logits);
  const auto vocabulary = static_cast<std::size_t>(logits.shape(2));
  std::vector<double> values(logits.data<float>(), logits.data<float>() + logits.size());
  for (std::size_t row = 0; row < values.size(); row += vocabulary) {
    double sum = 0;
    for (std::size_t i = row; i < row + vocabulary; ++i) sum += std::exp(values[i]);
    for (std::size_t i = row; i < row + vocabulary; ++i) values[i] -= std::log(sum);
  }
  return values;
}

TEST(SavedLogits, AreTheLikeliestTokensAndSomeOfTheOthers) {
  const SavedLogits& logits = saved();
  const auto vocabulary = static_cast<std::size_t>(demo_model().config().vocab_size), each = std::size_t{kSavedTop + kSavedDrawn};
  EXPECT_EQ(logits.log_rest.size(), std::size_t{kWindows} * (kLength - kFrom));
  for (int w = 0; w < kWindows; ++w) {
    const auto log_p = log_probabilities(w);
    for (std::size_t t = kFrom; t < kLength; t += 7) {
      const std::size_t at = static_cast<std::size_t>(w) * (kLength - kFrom) + t - kFrom;
      const double* row = log_p.data() + t * vocabulary;
      std::vector<double> sorted(row, row + vocabulary);
      std::sort(sorted.rbegin(), sorted.rend());
      double rest = 0;
      for (std::size_t i = kSavedTop; i < vocabulary; ++i) rest += std::exp(sorted[i]);
      for (std::size_t i = 0; i < each; ++i) {
        const double value = logits.log_probabilities[at * each + i];
        EXPECT_NEAR(value, row[logits.tokens[at * each + i]], 1e-4);
        if (i < kSavedTop) {
          EXPECT_NEAR(value, sorted[i], 1e-4);
        } else {
          EXPECT_LE(value, sorted[kSavedTop - 1] + 1e-4);
        }
      }
      EXPECT_NEAR(std::exp(logits.log_rest[at]), rest, 1e-6);
      const double expected = t + 1 < kLength ? -row[windows().row(w)[t + 1]] : 0;
      EXPECT_NEAR(logits.cross_entropy[at], expected, 1e-4);
    }
  }
}

// Of KL, exact and by what is saved: over positions it is as near as the error says, and no position's is below 0.
TEST(SavedLogits, SayWhatFullPrecisionSays) {
  for (const int position : {kFrom, kFrom + 30}) {
    const auto exact = rows_of(from(position)), by_saved = rows_by_saved(position);
    EXPECT_EQ(by_saved[0].kl_max, 0);
    EXPECT_LT(by_saved[1].kl_max, 1e-6);  // full precision once more
    for (std::size_t s = 0; s < exact.size(); ++s) {
      SCOPED_TRACE(exact[s].storage);
      EXPECT_NEAR(by_saved[s].perplexity, exact[s].perplexity, 1e-4 * exact[s].perplexity);
      EXPECT_EQ(by_saved[s].top1, exact[s].top1);
      EXPECT_FALSE(exact[s].kl_sampling_error.has_value());
      EXPECT_NEAR(by_saved[s].kl_mean, exact[s].kl_mean, 4 * *by_saved[s].kl_sampling_error + 1e-6);
      EXPECT_LE(*by_saved[s].kl_sampling_error, 0.01 * exact[s].kl_mean + 1e-7);
    }
    for (std::size_t s = 2; s < exact.size(); ++s) {
      EXPECT_NEAR(by_saved[s].kl_median / exact[s].kl_median, 1, 0.1);
      EXPECT_NEAR(by_saved[s].kl_max / exact[s].kl_max, 1, 0.1);
      EXPECT_NEAR(by_saved[s].error->kl_mean, exact[s].error->kl_mean, 4 * *by_saved[s].kl_sampling_error + 1e-6);
    }
  }
}

// Never less than what the likeliest tokens and the rest's mass say, which is a lower bound of KL; and off by no more than what is
// drawn and the rest's mass allow.  The other text is as far away as any storage can bring a model.
TEST(SavedLogits, AreWithinTheirBounds) {
  const auto full = log_probabilities(0), other = log_probabilities(1);
  const auto vocabulary = static_cast<std::size_t>(demo_model().config().vocab_size);
  const std::size_t each = std::size_t{kSavedTop + kSavedDrawn};
  const auto hidden = demo_model().forward(token_array(windows(), 1, 2), demo_model().make_caches(FullCache::factory()));
  const std::vector<std::int32_t> targets(kLength - kFrom, -1);
  const auto [scores, kl_variance] =
      score_saved(demo_model(), saved(), 0, kFrom, mx::slice(hidden, {0, kFrom, 0}, hidden.shape()), targets);
  double off = 0, masses = 0;
  for (std::size_t t = kFrom; t < kLength; ++t) {
    const double *p = full.data() + t * vocabulary, *q = other.data() + t * vocabulary;
    std::vector<bool> likely(vocabulary);
    double kl = 0, coarse = 0, rest = 0, rest_of_q = 0;
    const std::int32_t* tokens = saved().tokens.data() + (t - kFrom) * each;
    for (int i = 0; i < kSavedTop; ++i) likely[static_cast<std::size_t>(tokens[i])] = true;
    for (std::size_t i = 0; i < vocabulary; ++i) {
      kl += std::exp(p[i]) * (p[i] - q[i]);
      if (likely[i]) {
        coarse += std::exp(p[i]) * (p[i] - q[i]);
      } else {
        rest += std::exp(p[i]), rest_of_q += std::exp(q[i]);
      }
    }
    coarse += rest * std::log(rest / rest_of_q);
    EXPECT_LE(coarse, kl);
    EXPECT_GE(scores[t - kFrom].kl, coarse - 1e-4);
    off += scores[t - kFrom].kl - kl;
    masses += rest;
  }
  EXPECT_LE(off, 4 * std::sqrt(kl_variance));
  EXPECT_GE(off, -4 * std::sqrt(kl_variance) - masses);
}

TEST(SavedLogits, SameLogitsSameFile) {
  const testing::TemporaryFolder folder;
  write_logits(saved(), folder / "a");
  const SavedLogits read = read_logits(folder / "a");
  EXPECT_EQ(read.source, (folder / "a").string());
  write_logits(read, folder / "b");
  EXPECT_EQ(testing::get(folder / "a"), testing::get(folder / "b"));
  SavedLogits again;
  ScoringOptions scoring = from(kFrom);
  scoring.save = &again;
  evaluate(demo_model(), windows(), {}, {}, {}, scoring);
  write_logits(again, folder / "c");
  EXPECT_EQ(sha256(testing::get(folder / "a")), sha256(testing::get(folder / "c")));
  const auto direct = rows_by_saved(kFrom), from_file = rows_by_saved(kFrom, read);
  for (std::size_t s = 0; s < direct.size(); ++s) EXPECT_EQ(direct[s].kl_mean, from_file[s].kl_mean);
}

// A file of version 1 that stays as it is: of two tokens' worth of the bundled model.
TEST(SavedLogits, AnOldFileIsStillRead) {
  const SavedLogits old =
      read_logits(std::filesystem::path(VELOXQUANT_SOURCE_DIR) / "tests" / "evaluate" / "logits_v1.safetensors");
  const TokenBatch batch = testing::text_samples(1, 8);
  ScoringOptions scoring = from(5);
  check_logits(old, demo_model(), batch, 5);
  const std::vector<Storage> one = {peer_storage("mlx2", demo_model())};
  const auto exact = evaluate(demo_model(), batch, one, {}, {}, scoring);
  scoring.logits = &old;
  const auto by_saved = evaluate(demo_model(), batch, one, {}, {}, scoring);
  EXPECT_NEAR(by_saved[0].perplexity, exact[0].perplexity, 1e-3);
  EXPECT_NEAR(by_saved[1].kl_mean / exact[1].kl_mean, 1, 0.1);
}

TEST(SavedLogits, OfSomethingElseAreRefused) {
  const auto refuses = [](const SavedLogits& logits, const TokenBatch& batch, int position, const std::string& problem) {
    EXPECT_THAT([&] { check_logits(logits, demo_model(), batch, position); },
                ThrowsMessage<std::runtime_error>(HasSubstr(problem)));
  };
  check_logits(saved(), demo_model(), windows(), kFrom);
  refuses(saved(), windows(), kFrom - 1, "[logits] full precision: score_from: expected at most 19, got 20");
  refuses(saved(), testing::text_samples(kWindows, kLength - 1), kFrom, "length: expected 95, got 96");
  refuses(saved(), testing::text_samples(kWindows + 1, kLength), kFrom, "windows: expected 3, got 2");
  TokenBatch other = windows();
  other.tokens.back() ^= 1;
  refuses(saved(), other, kFrom,
          "SHA-256 of the windows' tokens: expected " +
              sha256({reinterpret_cast<const char*>(other.tokens.data()), other.tokens.size() * 4}));
  SavedLogits changed = saved();
  changed.model = "llama of 3 layers";
  changed.source = "some.file";
  refuses(changed, windows(), kFrom, "[logits] some.file: model: expected qwen2 of 12 layers, 2 KV heads of 64");
  // Of a model of the same shape, trained on.
  changed = saved();
  for (float& value : changed.probe) value *= 1.01f;
  refuses(changed, windows(), kFrom, "full precision: model: expected logits of its weights");
  ScoringOptions both = from(kFrom);
  SavedLogits some;
  both.logits = &saved(), both.save = &some;
  EXPECT_THROW(rows_of(both), std::invalid_argument);
}

class LogitsFile : public ::testing::Test {
 protected:
  LogitsFile() { write_logits(saved(), path_); }

  void refuses(const std::string& problem) {
    EXPECT_THAT([&] { read_logits(path_); },
                ThrowsMessage<std::runtime_error>(::testing::AllOf(HasSubstr(path_.string()), HasSubstr(problem))));
  }

  // With a checksum that is right, so that what is wrong is what was changed.
  void rewrite(const std::function<void(std::map<std::string, SafetensorsEntry>&, std::map<std::string, std::string>&)>& change) {
    write_logits(saved(), path_);
    std::string bytes = testing::get(path_);
    {
      const SafetensorsFile file(path_);
      auto entries = file.tensors();
      auto metadata = file.metadata();
      change(entries, metadata);
      Sha256 hash;
      for (const auto& [name, value] : metadata)
        if (name != "checksum") hash.add(name + "=" + value + "\n");
      for (const auto& [name, entry] : entries) {
        hash.add(name);
        hash.add({reinterpret_cast<const char*>(entry.data.data()), entry.data.size()});
      }
      metadata["checksum"] = hash.hex();
      bytes = serialize_entries(entries, metadata);
    }
    testing::put(path_, bytes);
  }

  const testing::TemporaryFolder folder_;
  const std::filesystem::path path_ = folder_ / "l.safetensors";
};

TEST_F(LogitsFile, DamageIsRefused) {
  const std::string whole = testing::get(path_);
  for (std::size_t at = 0; at < whole.size(); at += whole.size() / 50) {
    std::string bytes = whole;
    bytes[at] = static_cast<char>(bytes[at] ^ 4);
    testing::put(path_, bytes);
    refuses("");
  }
  for (const std::size_t size : {std::size_t{0}, std::size_t{7}, whole.size() / 2, whole.size() - 1}) {
    testing::put(path_, whole.substr(0, size));
    refuses("");
  }
  std::string last = whole;
  last.back() = static_cast<char>(last.back() ^ 1);
  testing::put(path_, last);
  refuses("checksum");
}

TEST_F(LogitsFile, WhatDoesNotFitIsNamed) {
  rewrite([](auto&, auto&) {});
  EXPECT_NO_THROW(read_logits(path_));
  for (const auto& [field, value, problem] : std::vector<std::tuple<std::string, std::string, std::string>>{
           {"format", "veloxquant-cache", "format: expected veloxquant-logits, got veloxquant-cache"},
           {"version", "2", "version: expected 1, got 2"},
           {"windows", "0", "windows: expected a whole number from 1"},
           {"windows", "3", "tokens: expected I32 [228, 160], got I32 [152, 160]"},
           {"windows", "2000000000", "tokens: expected I32 [152000000000, 160]"},
           {"length", "x", "length: expected a whole number from 2"},
           {"score_from", "95", "score_from: expected a whole number from 0 to 94, got 95"},
           {"top", "-1", "top: expected a whole number from 1 to 8192, got -1"},
           {"drawn", "1", "drawn: expected a whole number from 2"}}) {
    rewrite([&](auto&, auto& metadata) { metadata[field] = value; });
    refuses(problem);
  }
  rewrite([](auto&, auto& metadata) { metadata.erase("text"); });
  refuses("no text in the metadata: not a file of logits");
  rewrite([](auto& entries, auto&) { entries.erase("log_rest"); });
  refuses("no tensor log_rest");
  rewrite([](auto& entries, auto&) { entries.erase("probe"); });
  refuses("probe: expected a tensor of one dimension");
  rewrite([](auto& entries, auto&) { entries.at("tokens").dtype = "F32"; });
  refuses("tokens: expected I32 [152, 160], got F32 [152, 160]");
  std::vector<std::int32_t> tokens = saved().tokens;
  tokens[3] = 8192;
  rewrite([&](auto& entries, auto&) { entries.at("tokens").data = std::as_bytes(std::span(tokens)); });
  refuses("tokens: expected 0 to 8191, got 8192");
  std::vector<float> rest = saved().log_rest;
  rest[3] = NAN;
  rewrite([&](auto& entries, auto&) { entries.at("log_rest").data = std::as_bytes(std::span(rest)); });
  refuses("log_rest: expected finite values, got nan");
  std::vector<float> probe = saved().probe;
  probe[3] = INFINITY;
  rewrite([&](auto& entries, auto&) { entries.at("probe").data = std::as_bytes(std::span(probe)); });
  refuses("probe: expected finite values, got inf");
  // One that says of itself that it is of the model, and is not.
  probe = saved().probe;
  probe.resize(8193);
  rewrite([&](auto& entries, auto&) {
    entries.at("probe").data = std::as_bytes(std::span(probe));
    entries.at("probe").shape = {8193};
  });
  EXPECT_THAT([&] { check_logits(read_logits(path_), demo_model(), windows(), kFrom); },
              ThrowsMessage<std::runtime_error>(HasSubstr("vocab_size: expected 8192, got 8193")));
}

}  // namespace
}  // namespace veloxquant
