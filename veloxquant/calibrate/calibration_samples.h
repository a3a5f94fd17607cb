// What a model reads while it is calibrated.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "veloxquant/core/progress.h"
#include "veloxquant/model/language_model.h"
#include "veloxquant/text/recall.h"
#include "veloxquant/text/samples.h"
#include "veloxquant/text/text_encoder.h"

namespace veloxquant {

/// Samples of the texts (UTF-8; at even distances over all of them, each behind the tokenizer's prefix), or of the model's own text
/// where there are none.
/// Throws std::invalid_argument if the texts are too short, or the length exceeds the model's maximum, and as own_text does.
TokenBatch calibration_samples(const LanguageModel& model, const TextEncoder& tokenizer, const std::vector<std::string>& texts,
                               int num_samples, int length, std::uint64_t seed, const ProgressCallback& progress = {});

/// Running text, then text with facts sown.
struct CalibrationSet {
  TokenBatch samples;
  int running_samples;               // samples of running text; predicted KL speaks of them
  std::vector<AnswerSpans> answers;  // of each of the others
  std::vector<float> weights;        // [samples, length] or none: what the KL of each position counts
};

/// Half of the samples are the model's own text, half have facts sown in such text, asked for at their end (make_fact_samples);
/// with texts a third each, the middle one being theirs, or as much as they hold and the rest own text.  Tokens of answers count
/// eight times.  Fewer than three samples, or a length in which facts have no room: running text alone.
///
/// Throws as calibration_samples does, and std::runtime_error where there are no texts and the model's own
/// is one token over and over or cannot be written; with texts a warning says so, and they serve alone.
CalibrationSet calibration_set(const LanguageModel& model, const TextEncoder& tokenizer, const std::vector<std::string>& texts,
                               int num_samples, int length, std::uint64_t seed, const ProgressCallback& progress = {});

}  // namespace veloxquant
