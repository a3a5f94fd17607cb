#include "veloxquant/evaluate/evaluate.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "veloxquant/calibrate/observe.h"
#include "veloxquant/calibrate/recall.h"
#include "veloxquant/core/error.h"
#include "veloxquant/generate/generate.h"
#include "veloxquant/model/divergence.h"
#include "veloxquant/model/matrix.h"

namespace veloxquant {
namespace {

// Hidden states of one window that wait for their logits, of full precision and of as many storages as fit: 13 storages of 32,768
// tokens and 576 channels do.
constexpr std::size_t kHiddenBytes = std::size_t{1} << 30;

// What one storage scored, and what it answered in the two wordings.
struct Tally {
  std::vector<WindowScores> windows;
  RecallCount first, second;

  void add(const std::vector<PositionScore>& reference, const std::vector<PositionScore>& scores) {
    WindowScores& window = windows.emplace_back();
    for (std::size_t t = 0; t < scores.size(); ++t) {
      window.kl.push_back(scores[t].kl);
      window.agreements += scores[t].top == reference[t].top;
      window.cross_entropy += scores[t].cross_entropy;
    }
    window.targets = scores.size() - 1;
  }

  void add(const std::vector<PositionScore>& reference, const SavedScores& saved) {
    add(reference, saved.scores);
    windows.back().kl_variance = saved.kl_variance;
  }
};

// The token that follows each position; −1 for the last.
std::vector<std::int32_t> next_tokens(std::span<const std::int32_t> tokens) {
  std::vector<std::int32_t> next(tokens.begin() + 1, tokens.end());
  next.push_back(-1);
  return next;
}

void check_finite(const std::vector<PositionScore>& scores, const Storage& storage, int window, int score_from) {
  for (std::size_t t = 0; t < scores.size(); ++t) {
    const auto& [kl, cross_entropy, top] = scores[t];
    if (!std::isfinite(kl) || !std::isfinite(cross_entropy))
      throw_failure(
          "evaluate",
          "{}: window {}: expected finite logits, got KL {} and cross-entropy {} at position {}: float32 overflows with it",
          storage.name, window, kl, cross_entropy, static_cast<std::size_t>(score_from) + t);
  }
}

mx::array tokens_between(const mx::array& tokens, int begin, int end) {
  return mx::slice(tokens, {0, begin}, {1, end});
}

// Hidden states [1, T, hidden_size] of the positions from score_from on; `advance` is told of tokens times layers.
using Advance = std::function<void(int tokens)>;

mx::array read_in_one_go(const LanguageModel& model, const mx::array& tokens, const CacheFactory& factory, int score_from,
                         const Advance& advance) {
  auto caches = model.make_caches(factory);
  auto cache = caches.begin();
  const int length = tokens.shape(1);
  const auto hidden = model.forward_by_layers(tokens, caches, [&] {
    (cache++)->reset();  // nothing is read after it
    advance(length);
  });
  return mx::contiguous(mx::slice(hidden, {0, score_from, 0}, hidden.shape()));
}

mx::array read_in_steps(const LanguageModel& model, const mx::array& tokens, const CacheFactory& factory,
                        const ScoringOptions& scoring, const Advance& advance) {
  const auto caches = model.make_caches(factory);
  const int length = tokens.shape(1);
  const auto read = [&](int begin, int end) {
    return model.forward_by_layers(tokens_between(tokens, begin, end), caches, [&] { advance(end - begin); });
  };
  for (int begin = 0; begin < scoring.score_from; begin += kPromptChunk)
    mx::eval(read(begin, std::min(begin + kPromptChunk, scoring.score_from)));
  std::vector<mx::array> steps;
  for (int begin = scoring.score_from; begin < length; begin += scoring.step) {
    steps.push_back(read(begin, std::min(begin + scoring.step, length)));
    mx::eval(steps.back());
  }
  return mx::concatenate(steps, 1);
}

// Scores one window by all storages, full precision first.
class WindowScoring {
 public:
  WindowScoring(const LanguageModel& model, std::span<const Storage> storages, const ScoringOptions& scoring,
                std::vector<Tally>& tallies, ProgressStage& stage)
      : model_(model), storages_(storages), scoring_(scoring), tallies_(tallies), stage_(stage) {}

  void operator()(const TokenBatch& windows, int index) {
    const auto tokens = token_array(windows, index, index + 1);
    const auto targets = next_tokens(windows.row(index).subspan(static_cast<std::size_t>(scoring_.score_from)));
    scoring_.logits ? by_saved_logits(index, tokens, targets) : by_full_precision(index, tokens, targets);
  }

 private:
  mx::array hidden_of(std::size_t storage, const mx::array& tokens) {
    const CacheFactory& factory = storages_[storage].factory;
    const Advance advance = [&](int read) { stage_.advance(static_cast<std::size_t>(read)); };
    auto hidden = storage == 0 || scoring_.step == 0 ? read_in_one_go(model_, tokens, factory, scoring_.score_from, advance)
                                                     : read_in_steps(model_, tokens, factory, scoring_, advance);
    mx::eval(hidden);
    return hidden;
  }

  void by_full_precision(int index, const mx::array& tokens, std::span<const std::int32_t> targets) {
    // The reference's come first in each group, since both logits are needed at once.
    std::vector<mx::array> hidden = {hidden_of(0, tokens)};
    const std::size_t group = std::max<std::size_t>(kHiddenBytes / hidden[0].nbytes(), 2) - 1;
    std::size_t begin = 1, end;
    do {
      end = std::min(begin + group, storages_.size());
      for (std::size_t s = begin; s < end; ++s) hidden.push_back(hidden_of(s, tokens));
      const auto scores = score_hidden(model_, hidden, targets);
      for (std::size_t i = begin == 1 ? 0 : 1; i < hidden.size(); ++i) {
        const std::size_t s = i == 0 ? 0 : begin + i - 1;
        check_finite(scores[i], storages_[s], index, scoring_.score_from);
        tallies_[s].add(scores[0], scores[i]);
      }
      hidden.resize(1, hidden[0]);
      begin = end;
    } while (end < storages_.size());
    if (scoring_.save) add_window(model_, hidden[0], targets, *scoring_.save);
  }

  void by_saved_logits(int index, const mx::array& tokens, std::span<const std::int32_t> targets) {
    const auto reference = reference_scores(*scoring_.logits, index, scoring_.score_from);
    tallies_[0].add(reference, reference);
    for (std::size_t s = 1; s < storages_.size(); ++s) {
      const auto saved = score_saved(model_, *scoring_.logits, index, scoring_.score_from, hidden_of(s, tokens), targets);
      check_finite(saved.scores, storages_[s], index, scoring_.score_from);
      tallies_[s].add(reference, saved);
    }
  }

  const LanguageModel& model_;
  std::span<const Storage> storages_;
  const ScoringOptions& scoring_;
  std::vector<Tally>& tallies_;
  ProgressStage& stage_;
};

// Of the mean KL, by what was drawn.
double sampling_error(std::span<const WindowScores> windows) {
  double variance = 0, positions = 0;
  for (const auto& window : windows) {
    variance += window.kl_variance;
    positions += static_cast<double>(window.kl.size());
  }
  return std::sqrt(variance) / positions;
}

EvaluationRow row_of(const LanguageModel& model, const Storage& storage, const Tally& tally, const WindowStatistics& statistics,
                     int context) {
  EvaluationRow row;
  static_cast<Measures&>(row) = statistics.all;
  row.storage = storage.name;
  row.effective_bits = storage.effective_bits(context);
  row.constant_bytes = storage.constant_bytes;
  row.sliding_bytes = sliding_bytes(model.identity(), storage.sliding, context);
  row.error = standard_error(statistics);
  row.recall = tally.first.share();
  row.recall_second = tally.second.share();
  return row;
}

std::vector<EvaluationRow> report(const LanguageModel& model, std::span<const Storage> storages, std::span<const Tally> tallies,
                                  int context, bool sampled) {
  std::vector<WindowStatistics> statistics;
  for (const auto& tally : tallies) statistics.push_back(window_statistics(tally.windows, tallies[0].windows));
  std::vector<EvaluationRow> rows;
  for (std::size_t s = 0; s < storages.size(); ++s) {
    rows.push_back(row_of(model, storages[s], tallies[s], statistics[s], context));
    if (sampled) rows.back().kl_sampling_error = sampling_error(tallies[s].windows);
    for (const auto& other : statistics) rows.back().differences.push_back(paired_difference(statistics[s], other));
  }
  return rows;
}

}  // namespace

void check_scoring(const ScoringOptions& options, int length) {
  if (length < 2) throw_invalid("evaluate", "expected windows of at least 2 tokens, got {}", length);
  if (options.score_from < 0 || options.score_from > length - 2)
    throw_invalid("evaluate", "score_from: expected 0 to {} in windows of {} tokens, got {}", length - 2, length,
                  options.score_from);
  if (options.step < 0)
    throw_invalid("evaluate", "step: expected at least 1 token, or 0 for windows in one go, got {}", options.step);
}

std::vector<EvaluationRow> evaluate(const LanguageModel& model, const TokenBatch& windows, std::span<const Storage> peers_and_plans,
                                    const RecallDocuments& documents, const ProgressCallback& progress,
                                    const ScoringOptions& scoring) {
  check_scoring(scoring, windows.length);
  if (windows.count < 1) throw_invalid("evaluate", "expected at least 1 window, got {}", windows.count);
  if (scoring.logits && scoring.save) throw_invalid("evaluate", "expected logits to compare with or to save, got both");
  if (scoring.logits) check_logits(*scoring.logits, model, windows, scoring.score_from);
  const Float32Scope scope;
  if (scoring.save) *scoring.save = start_logits(model, windows, scoring.score_from);
  std::vector<Storage> storages = {full_storage()};
  storages.insert(storages.end(), peers_and_plans.begin(), peers_and_plans.end());
  std::vector<Tally> tallies(storages.size());

  const std::size_t runs = storages.size() - (scoring.logits ? 1 : 0);
  ProgressStage stage(progress, "scoring windows",
                      windows.tokens.size() * runs * static_cast<std::size_t>(model.config().num_layers));
  WindowScoring score(model, storages, scoring, tallies, stage);
  for (int i = 0; i < windows.count; ++i) score(windows, i);

  ProgressStage asking(progress, "asking for facts", (documents.first.size() + documents.second.size()) * storages.size());
  const auto ask_all = [&](const std::vector<RecallDocument>& all, RecallCount Tally::*count) {
    for (const auto& document : all) {
      for (std::size_t s = 0; s < storages.size(); ++s) {
        tallies[s].*count += recall(model, document.tokens, document.answers, storages[s].factory);
        asking.advance();
      }
    }
  };
  ask_all(documents.first, &Tally::first);
  ask_all(documents.second, &Tally::second);
  return report(model, storages, tallies, windows.length, scoring.logits != nullptr);
}

}  // namespace veloxquant
