// Documents in which facts are sown and asked for at the end: what a damaged cache forgets first.
#pragma once

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "veloxquant/core/progress.h"
#include "veloxquant/text/tokenizer.h"

namespace veloxquant {

struct RecallDocument {
  std::vector<std::int32_t> tokens;          // context + 1
  std::vector<std::pair<int, int>> answers;  // [begin, end) of each answer among the tokens
};

/// `count` documents of context + 1 tokens: a stretch of `filler` with two to six notes at random places (" [Note: the room number
/// of Mr. Rowan is 40312.]"), then a question and its answer for each, in another order: the passages that the bundled model was
/// trained to recall (examples/train.py).  Document i depends on the seed and i alone.
///
/// Throws std::invalid_argument for a count below 1 or above 100,000, for more tokens than check_batch_size() accepts, if the
/// context is too small for the notes (and says how large it must be), and if the filler is too short for the context.
std::vector<RecallDocument> make_recall_documents(const Tokenizer& tokenizer, std::span<const std::int32_t> filler, int count,
                                                  int context, std::uint64_t seed, const ProgressCallback& progress = {});

}  // namespace veloxquant
