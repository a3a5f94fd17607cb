// The main job: from a model and samples to a plan.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "veloxquant/core/progress.h"
#include "veloxquant/model/model.h"
#include "veloxquant/plan/plan.h"
#include "veloxquant/text/samples.h"

namespace veloxquant {

enum class Units {
  kUniform,  // one width for the whole model
  kLayer,    // one width a layer, for keys and values alike
};

/// "uniform" or "layer".
std::string_view to_string(Units units);

struct PlanOptions {
  std::string method = "vecinfer";
  double bits = 2.0;  // effective bits on average: scales and norms count
  Units units = Units::kUniform;
  std::uint64_t seed = 0;
};

/// Gives bits to units, fits their quantizers to the keys (after RoPE) and values of `samples`, and fills everything of a plan but
/// its provenance's source of text.
///
/// kUniform takes the largest width within `bits`; where that stays below, a warning says what other widths give.  kLayer measures
/// sensitivities and gives the bits that minimise predicted KL: for scalar quantizers by the documented way (distortion curve, then
/// integer widths), for `vecinfer` by the distortion that each width is measured to have.
///
/// Throws std::invalid_argument if `bits` lies outside what the method offers for the model's head_dim (says the range), if the
/// method cannot store such heads, or if there are fewer vectors than centroids.
Plan make_plan(const Model& model, const TokenBatch& samples, const PlanOptions& options, const ProgressCallback& progress = {});

}  // namespace veloxquant
