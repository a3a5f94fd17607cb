#include "veloxquant/calibrate/calibration_samples.h"

#include <algorithm>
#include <map>

#include "veloxquant/core/error.h"
#include "veloxquant/core/random.h"
#include "veloxquant/core/warning.h"
#include "veloxquant/generate/own_text.h"

namespace veloxquant {
namespace {

// Answers are few tokens of many, and what a damaged cache forgets first.
constexpr float kAnswerWeight = 8;

// Fewer tokens have no room for a fact and a question.
constexpr int kLeastFactLength = 256;

// Of a sample of at least kLeastJudged tokens, above which it teaches nothing.
constexpr double kMostOfOneToken = 0.9;
constexpr int kLeastJudged = 32;

std::pair<std::int32_t, double> commonest(std::span<const std::int32_t> tokens) {
  std::map<std::int32_t, int> counts;
  for (const auto token : tokens) ++counts[token];
  const auto most =
      std::max_element(counts.begin(), counts.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
  return {most->first, static_cast<double>(most->second) / static_cast<double>(tokens.size())};
}

TokenBatch own_text(const LanguageModel& model, int count, int length, std::uint64_t seed, const ProgressCallback& progress) {
  TokenBatch samples = generate_own_text(model, count, length, seed, progress);
  if (length < kLeastJudged) return samples;
  int degenerate = 0;
  for (int i = 0; i < count; ++i) {
    const auto [token, share] = commonest(samples.row(i));
    if (share <= kMostOfOneToken) continue;
    ++degenerate;
    if (degenerate == count)
      throw_failure("own text", "the model writes token {} over and over ({:.0f} % of a sample): pass a text", token, 100 * share);
  }
  if (degenerate > 0) warn(fmt::format("own text: {} of {} samples are one token over and over", degenerate, count));
  return samples;
}

void append(TokenBatch& to, const TokenBatch& from) {
  to.tokens.insert(to.tokens.end(), from.tokens.begin(), from.tokens.end());
  to.count += from.count;
}

std::vector<std::vector<std::int32_t>> encode_all(const LanguageModel& model, const TextEncoder& tokenizer,
                                                  const std::vector<std::string>& texts, int length) {
  const int longest = model.config().max_position_embeddings;
  if (length > longest) throw_invalid("samples", "length: expected at most {} (the model's maximum), got {}", longest, length);
  const auto check = [&](const std::vector<std::int32_t>& tokens) {
    for (const auto token : tokens)
      if (token < 0 || token >= model.config().vocab_size)
        throw_invalid("samples", "the tokenizer gives token {}, and the model has {}: they are not of one model", token,
                      model.config().vocab_size);
  };
  check(tokenizer.prefix());
  std::vector<std::vector<std::int32_t>> tokens;
  for (const auto& text : texts) check(tokens.emplace_back(tokenizer.encode(text)));
  return tokens;
}

// At most `wanted` samples of the texts, as many as they hold; throws where that is none.
TokenBatch some_samples(const LanguageModel& model, const TextEncoder& tokenizer, const std::vector<std::string>& texts, int wanted,
                        int length) {
  if (texts.empty()) return TokenBatch(0, length);
  const auto tokens = encode_all(model, tokenizer, texts, length);
  std::size_t held = 0;
  const auto prefix = tokenizer.prefix();
  const std::size_t width = std::max(static_cast<std::size_t>(length), prefix.size() + 1) - prefix.size();
  for (const auto& text : tokens) held += text.size() / width;
  return cut_samples(tokens, static_cast<int>(std::clamp<std::size_t>(held, 1, static_cast<std::size_t>(wanted))), length, prefix);
}

}  // namespace

TokenBatch calibration_samples(const LanguageModel& model, const TextEncoder& tokenizer, const std::vector<std::string>& texts,
                               int num_samples, int length, std::uint64_t seed, const ProgressCallback& progress) {
  if (texts.empty()) return own_text(model, num_samples, length, seed, progress);
  return cut_samples(encode_all(model, tokenizer, texts, length), num_samples, length, tokenizer.prefix());
}

CalibrationSet calibration_set(const LanguageModel& model, const TextEncoder& tokenizer, const std::vector<std::string>& texts,
                               int num_samples, int length, std::uint64_t seed, const ProgressCallback& progress) {
  const int parts = texts.empty() ? 2 : 3, facts = length >= kLeastFactLength && num_samples >= 3 ? num_samples / parts : 0;
  if (facts == 0)
    warn(fmt::format("no facts are sown in {} samples of {} tokens: recall is neither taught nor measured", num_samples, length));
  // Before anything is written that takes long.
  const auto given = some_samples(model, tokenizer, texts, std::max(1, num_samples / parts), length);
  CalibrationSet set{TokenBatch(0, length), 0, {}, {}};
  try {
    if (const int own = num_samples - facts - given.count; own > 0)
      append(set.samples, own_text(model, own, length, seed, progress));
  } catch (const Interrupted&) {
    throw;
  } catch (const std::runtime_error& error) {
    if (given.count == 0) throw;
    warn(fmt::format("{}: only the texts are read", error.what()));
  }
  const auto filler = text_of(set.samples.count > 0 ? set.samples : given, tokenizer.prefix());
  append(set.samples, given);
  set.running_samples = set.samples.count;
  if (facts == 0) return set;
  try {
    auto sown = make_fact_samples(tokenizer, filler, facts, length, Random(seed, 1).next(), progress);
    set.answers = std::move(sown.answers);
    append(set.samples, sown.samples);
  } catch (const std::invalid_argument& error) {
    warn(fmt::format("no facts are sown: {}", error.what()));
    return set;
  }
  set.weights.assign(set.samples.tokens.size(), 1.0f);
  for (int i = 0; i < facts; ++i)
    for (const auto& [begin, end] : set.answers[static_cast<std::size_t>(i)]) {
      // The position before a token predicts it.
      const auto first = set.weights.begin() + static_cast<std::ptrdiff_t>(set.running_samples + i) * length;
      std::fill(first + begin - 1, first + end - 1, kAnswerWeight);
    }
  return set;
}

}  // namespace veloxquant
