// From a model and texts to a plan: what the command `calibrate` and Python's `calibrate` do.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "veloxquant/calibrate/adjoint_plan.h"
#include "veloxquant/core/progress.h"
#include "veloxquant/model/language_model.h"
#include "veloxquant/text/text_encoder.h"

namespace veloxquant {

/// A text (UTF-8) to calibrate on, and the name by which a plan remembers it.
struct NamedText {
  std::string name, text;
};

struct CalibrateOptions {
  std::string method = "rotated_pq";                 // a name in quantizer_methods()
  double bits = 2.0;                                 // effective bits on average at `context`, everything stored per token counted
  std::optional<std::int64_t> bytes = std::nullopt;  // rotated_pq, in place of bits: of one sequence of `context` tokens
  int context = 0;                                   // 0: the model's maximum
  std::optional<Units> units = std::nullopt;         // none: kHead for rotated_pq; else kUniform where the method learns, or kLayer
  std::optional<Rotation> keys = std::nullopt;       // rotated_pq; none: kFull
  std::optional<int> window = std::nullopt, sinks = std::nullopt;  // rotated_pq; none: kDefaultWindow, kDefaultSinks
  bool quantize_sliding = false;                                   // also layers with a sliding window
  int num_samples = 0;                                             // 0: 40 for rotated_pq, else 32
  int length = 0;  // tokens of a sample; 0: the model's maximum up to 2048 for rotated_pq, else 512
  std::uint64_t seed = 0;
};

/// Reads samples of the texts and of the model's own text as the method does (calibration_set, calibration_samples) and makes the
/// plan (make_adjoint_plan, make_plan); methods other than rotated_pq fill in `plan` alone.
/// Throws as these do, and std::invalid_argument for options of rotated_pq with another method.
AdjointPlan calibrate(const LanguageModel& model, const TextEncoder& tokenizer, const std::vector<NamedText>& texts,
                      const CalibrateOptions& options, const ProgressCallback& progress = {});

}  // namespace veloxquant
