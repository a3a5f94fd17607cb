// Documents in which facts are sown and asked for at the end: what a damaged cache forgets first.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "veloxquant/core/progress.h"
#include "veloxquant/text/fact_wording.h"
#include "veloxquant/text/samples.h"
#include "veloxquant/text/text_encoder.h"

namespace veloxquant {

/// [begin, end) of answers among the tokens of a document, ascending.
using AnswerSpans = std::vector<std::pair<int, int>>;

struct RecallDocument {
  std::vector<std::int32_t> tokens;  // context + 1
  AnswerSpans answers;
};

/// For evaluation: `count` documents of context + 1 tokens: the tokenizer's prefix, a stretch of `filler` with two to six notes at
/// random places, then a question and its answer, five digits, for each, in another order.  Document i depends on the seed and i
/// alone.
///
/// Throws std::invalid_argument for a count below 1 or above 100,000, for more tokens than check_batch_size() accepts, if the
/// context is too small for the notes (and says how large it must be), and if the filler is too short for the context.
std::vector<RecallDocument> make_recall_documents(const TextEncoder& tokenizer, std::span<const std::int32_t> filler, int count,
                                                  int context, std::uint64_t seed, Wording wording = Wording::kFirst,
                                                  const ProgressCallback& progress = {});

struct FactSamples {
  TokenBatch samples;
  std::vector<AnswerSpans> answers;  // of each sample
};

/// For calibration: `count` samples of `length` tokens, each in one of the calibration_wordings(), in turn, and each behind the
/// tokenizer's prefix.  Numbered notes, one per 150 to 400 tokens, stand at random places of a stretch of `filler`; at the end each
/// is asked for in another order, some twice, for its value (a number, a word or a code) or as a whole.  At least two notes where
/// they fit, one where they do not, and at most as many as the wording has names.  Sample i depends on the seed and i alone.
///
/// Throws like make_recall_documents.
FactSamples make_fact_samples(const TextEncoder& tokenizer, std::span<const std::int32_t> filler, int count, int length,
                              std::uint64_t seed, const ProgressCallback& progress = {});

}  // namespace veloxquant
