// What a model still knows with its keys and values stored in other ways.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "veloxquant/core/progress.h"
#include "veloxquant/evaluate/peers.h"
#include "veloxquant/evaluate/saved_logits.h"
#include "veloxquant/evaluate/statistics.h"
#include "veloxquant/model/language_model.h"
#include "veloxquant/text/recall.h"
#include "veloxquant/text/samples.h"

namespace veloxquant {

/// One row of a report; divergences are in nats per token against full precision.
struct EvaluationRow : Measures {
  std::string storage;
  double effective_bits = 0;  // at the length of a window
  std::size_t constant_bytes = 0;
  std::int64_t sliding_bytes = 0;             // of the layers that the bits do not count, at the length of a window
  std::optional<Measures> error;              // standard errors over windows (standard_error()); none of a single window
  std::vector<PairedDifference> differences;  // [rows]: this row less each row of the report
  std::optional<double> kl_sampling_error;    // of kl_mean, by what was drawn of saved logits; none where KL is exact
  std::optional<double> recall;               // share of facts answered exactly; none where no documents were given
  std::optional<double> recall_second;
};

/// Documents in both wordings of evaluation.
struct RecallDocuments {
  std::vector<RecallDocument> first, second;
};

/// How windows are read and scored.
struct ScoringOptions {
  int score_from = 0;  // positions before it are read and not scored: [0, length − 2]

  /// 0: a window is read in one go, and a query sees what storage makes of all tokens up to its own at once.  n ≥ 1: as when text
  /// is written, so that a query sees the storage in the state that writing has: tokens before score_from in chunks of
  /// kPromptChunk, as generate() reads a prompt, and the others n at a time.  The two differ where what is read back of a token
  /// hangs on later ones (groups of tokens, patches), else by rounding.
  int step = 0;

  const SavedLogits* logits = nullptr;  // full precision's, which then runs over no window
  SavedLogits* save = nullptr;          // becomes full precision's; not together with logits
};

/// Throws std::invalid_argument that names the option where windows of `length` tokens cannot be scored so.  Whether logits fit is
/// for check_logits().
void check_scoring(const ScoringOptions& options, int length);

/// Runs full precision and every storage over the same windows and recall documents.
///
/// Each window is scored teacher-forced: query t sees the keys and values up to t as the storage gives them back, and position t is
/// the distribution of token t + 1.  Perplexity counts all tokens behind score_from, divergence and agreement all positions from
/// score_from on.  A fact counts as recalled if every token of its answer is the likeliest one.  Full precision runs once a window,
/// whatever it is compared with, and in one go: what it stores is the same in any steps.  Memory beyond the weights: what one layer
/// makes of a window (with a step: of a chunk, and the caches of all layers), 1 GiB at most of hidden states (those of two storages
/// at least), and some tens of MiB of logits at a time.  All products are in float32.  The first row is full precision; then one
/// row per storage, in order.  Throws std::invalid_argument for windows of fewer than 2 tokens and as check_scoring() does, and
/// std::runtime_error that names storage, window and position if a model's logits are not finite, and as check_logits() does.
std::vector<EvaluationRow> evaluate(const LanguageModel& model, const TokenBatch& windows, std::span<const Storage> storages,
                                    const RecallDocuments& documents, const ProgressCallback& progress = {},
                                    const ScoringOptions& scoring = {});

}  // namespace veloxquant
