#include "veloxquant/evaluate/evaluate.h"

#include <algorithm>
#include <cmath>

#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "veloxquant/calibrate/observe.h"
#include "veloxquant/calibrate/recall.h"
#include "veloxquant/core/error.h"
#include "veloxquant/model/divergence.h"

namespace veloxquant {
namespace {

// Hidden states of one window that wait for their logits, of full precision and of as many storages as fit: 13 storages of 32,768
// tokens and 576 channels do.
constexpr std::size_t kHiddenBytes = std::size_t{1} << 30;

// Sums over positions and facts for one storage.
class Tally {
 public:
  void add(const std::vector<PositionScore>& reference, const std::vector<PositionScore>& scores) {
    for (std::size_t t = 0; t < scores.size(); ++t) {
      kl_.push_back(scores[t].kl);
      agreements_ += scores[t].top == reference[t].top;
      cross_entropy_ += scores[t].cross_entropy;
    }
    targets_ += scores.size() - 1;
  }

  EvaluationRow row(const LanguageModel& model, const Storage& storage, int context) {
    EvaluationRow row;
    row.storage = storage.name;
    row.effective_bits = storage.effective_bits(context);
    row.constant_bytes = storage.constant_bytes;
    row.sliding_bytes = sliding_bytes(model.identity(), storage.sliding, context);
    const auto positions = static_cast<double>(kl_.size());
    row.perplexity = std::exp(cross_entropy_ / static_cast<double>(std::max<std::size_t>(targets_, 1)));
    for (const double kl : kl_) row.kl_mean += kl / positions;
    const auto tail = kl_.begin() + static_cast<std::ptrdiff_t>(std::min(positions - 1, std::ceil(0.999 * positions) - 1));
    std::nth_element(kl_.begin(), tail, kl_.end());
    row.kl_p999 = *tail;
    row.top1 = static_cast<double>(agreements_) / positions;
    row.recall = first.share();
    row.recall_second = second.share();
    return row;
  }

  RecallCount first, second;  // in the two wordings

 private:
  std::vector<float> kl_;
  double cross_entropy_ = 0;
  std::size_t agreements_ = 0, targets_ = 0;
};

// The token that follows each position; −1 for the last.
std::vector<std::int32_t> next_tokens(std::span<const std::int32_t> tokens) {
  std::vector<std::int32_t> next(tokens.begin() + 1, tokens.end());
  next.push_back(-1);
  return next;
}

void check_finite(const std::vector<PositionScore>& scores, const Storage& storage, int window) {
  for (const auto& [kl, cross_entropy, top] : scores)
    if (!std::isfinite(kl) || !std::isfinite(cross_entropy))
      throw_failure("evaluate", "{}: window {}: expected finite logits, got KL {} and cross-entropy {}: float32 overflows with it",
                    storage.name, window, kl, cross_entropy);
}

void score_window(const LanguageModel& model, const TokenBatch& windows, int index, std::span<const Storage> storages,
                  std::vector<Tally>& tallies, ProgressStage& stage) {
  const auto tokens = token_array(windows, index, index + 1);
  const auto targets = next_tokens(windows.row(index));
  const auto hidden_of = [&](const Storage& storage) {
    auto caches = model.make_caches(storage.factory);
    auto cache = caches.begin();
    auto hidden = model.forward_by_layers(tokens, caches, [&] {
      (cache++)->reset();  // a window is read in one go
      stage.advance();
    });
    mx::eval(hidden);
    return hidden;
  };
  // The reference's come first in each group, since both logits are needed at once.
  std::vector<mx::array> hidden = {hidden_of(storages[0])};
  const std::size_t group = std::max<std::size_t>(kHiddenBytes / hidden[0].nbytes(), 2) - 1;
  std::size_t begin = 1, end;
  do {
    end = std::min(begin + group, storages.size());
    for (std::size_t s = begin; s < end; ++s) hidden.push_back(hidden_of(storages[s]));
    const auto scores = score_hidden(model, hidden, targets);
    for (std::size_t i = begin == 1 ? 0 : 1; i < hidden.size(); ++i) {
      const std::size_t s = i == 0 ? 0 : begin + i - 1;
      check_finite(scores[i], storages[s], index);
      tallies[s].add(scores[0], scores[i]);
    }
    hidden.resize(1, hidden[0]);
    begin = end;
  } while (end < storages.size());
}

}  // namespace

std::vector<EvaluationRow> evaluate(const LanguageModel& model, const TokenBatch& windows, std::span<const Storage> peers_and_plans,
                                    const RecallDocuments& documents, const ProgressCallback& progress) {
  if (windows.length < 2) throw_invalid("evaluate", "expected windows of at least 2 tokens, got {}", windows.length);
  std::vector<Storage> storages = {full_storage()};
  storages.insert(storages.end(), peers_and_plans.begin(), peers_and_plans.end());
  std::vector<Tally> tallies(storages.size());

  ProgressStage stage(
      progress, "scoring windows",
      static_cast<std::size_t>(windows.count) * storages.size() * static_cast<std::size_t>(model.config().num_layers));
  for (int i = 0; i < windows.count; ++i) score_window(model, windows, i, storages, tallies, stage);

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

  std::vector<EvaluationRow> rows;
  for (std::size_t s = 0; s < storages.size(); ++s) rows.push_back(tallies[s].row(model, storages[s], windows.length));
  return rows;
}

}  // namespace veloxquant
