// Plans of rotated_pq: every head's keys and values at the width at which the model loses least.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "veloxquant/calibrate/calibration_samples.h"
#include "veloxquant/calibrate/width_allocation.h"
#include "veloxquant/core/progress.h"
#include "veloxquant/model/language_model.h"
#include "veloxquant/plan/plan.h"
#include "veloxquant/quantize/rotated_pq.h"

namespace veloxquant {

struct AdjointPlanOptions {
  double bits = 2.0;                                 // effective bits on average at `context`, everything counted
  std::optional<std::int64_t> bytes = std::nullopt;  // in place of bits: of keys and values of a sequence of `context` tokens,
                                                     // layers that slide included
  int context = 0;                                   // 0: the model's maximum
  Units units = Units::kHead;
  Rotation keys = Rotation::kFull;
  int window = kDefaultWindow, sinks = kDefaultSinks;
  std::uint64_t seed = 0;
  bool quantize_sliding = false;  // also layers with a sliding window, counted as if they kept all tokens
};

struct AdjointPlan {
  Plan plan;
  std::vector<FrontierPoint> frontier;  // of quickly fitted codebooks, scaled so that it meets the plan's own predicted KL
  std::optional<double> full_recall, plan_recall;  // share of some of the set's facts that is still answered; none without facts
};

/// Throws as make_adjoint_plan would, before any sample of `length` tokens is made.
void check_adjoint_plan_options(const ModelConfig& config, const AdjointPlanOptions& options, int length);

/// One forward and one backward pass over the set; a ladder of widths for every unit; the exact allocation of least predicted KL
/// within the budget; the few units with most at stake measured, and allocated again; codebooks in full for what was chosen.
/// Throws std::invalid_argument for a budget that no choice meets or that exceeds the dearest (says the range), a context that
/// window and sinks fill, samples of no more tokens than these (nothing would be read from what is coded), and as unit_statistics
/// does.
AdjointPlan make_adjoint_plan(const LanguageModel& model, const CalibrationSet& set, const AdjointPlanOptions& options,
                              const ProgressCallback& progress = {});

}  // namespace veloxquant
