// What a model reads while it is calibrated.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "veloxquant/core/progress.h"
#include "veloxquant/model/model.h"
#include "veloxquant/text/samples.h"
#include "veloxquant/text/tokenizer.h"

namespace veloxquant {

/// Samples of the texts (UTF-8; at even distances over all of them), or of the model's own text where there are none.
/// Throws std::invalid_argument if the texts are too short, or the length exceeds the model's maximum.
TokenBatch calibration_samples(const Model& model, const Tokenizer& tokenizer, const std::vector<std::string>& texts,
                               int num_samples, int length, std::uint64_t seed, const ProgressCallback& progress = {});

}  // namespace veloxquant
