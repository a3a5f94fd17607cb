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
#include "veloxquant/model/language_model.h"
#include "veloxquant/text/recall.h"
#include "veloxquant/text/samples.h"

namespace veloxquant {

/// One row of a report; divergences are in nats per token against full precision.
struct EvaluationRow {
  std::string storage;
  double effective_bits = 0;  // at the length of a window
  std::size_t constant_bytes = 0;
  std::int64_t sliding_bytes = 0;  // of the layers that the bits do not count, at the length of a window
  double perplexity = 0;
  double kl_mean = 0;
  double kl_p999 = 0;            // the KL divergence that 99.9 % of the positions stay below
  double top1 = 0;               // share of positions whose likeliest token is that of full precision
  std::optional<double> recall;  // share of facts answered exactly; none where no documents were given
  std::optional<double> recall_second;
};

/// Documents in both wordings of evaluation.
struct RecallDocuments {
  std::vector<RecallDocument> first, second;
};

/// Runs full precision and every storage over the same windows and recall documents.
///
/// Each window is scored teacher-forced: query t sees the keys and values up to t as the storage gives them back.  Perplexity
/// counts all tokens but a window's first, divergence and agreement all positions.  A fact counts as recalled if every token of its
/// answer is the likeliest one.  Full precision runs once a window, whatever it is compared with.  Memory beyond the weights: what
/// one layer makes of a window, 1 GiB at most of hidden states (those of two storages at least), and some tens of MiB of logits at
/// a time.  The first row is full precision; then one row per storage, in order. Throws std::runtime_error that names the storage
/// if a model's logits are not finite with it.
std::vector<EvaluationRow> evaluate(const LanguageModel& model, const TokenBatch& windows, std::span<const Storage> storages,
                                    const RecallDocuments& documents, const ProgressCallback& progress = {});

}  // namespace veloxquant
