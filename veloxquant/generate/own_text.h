// Text that the model writes itself.
#pragma once

#include <cstdint>

#include "veloxquant/core/progress.h"
#include "veloxquant/model/language_model.h"
#include "veloxquant/text/samples.h"

namespace veloxquant {

/// `num_samples` sequences of `length` tokens drawn from the model at temperature 1, each starting with its begin-of-text token
/// (or, where it has none, the end-of-text token, which separates documents in training).  What a model writes covers what it
/// knows, so that calibrating on it needs no text from the user.
///
/// Same seed, same text on one device; devices differ where two tokens are equally likely to float precision.
/// Throws std::invalid_argument for counts below 1 and a length beyond the model's maximum, std::runtime_error if config.json names
/// neither token.
TokenBatch generate_own_text(const LanguageModel& model, int num_samples, int length, std::uint64_t seed,
                             const ProgressCallback& progress = {});

}  // namespace veloxquant
