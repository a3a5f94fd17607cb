// The main job: from a model and samples to a plan.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "veloxquant/core/progress.h"
#include "veloxquant/model/language_model.h"
#include "veloxquant/plan/plan.h"
#include "veloxquant/text/samples.h"

namespace veloxquant {

enum class Units {
  kUniform,  // one width for the whole model
  kLayer,    // one width a layer, for keys and values alike
  kKv,       // one for the keys of a layer, one for its values
  kHead,     // one for the keys of each KV head, one for its values
};

/// "uniform", "layer", "kv" or "head".
std::string_view to_string(Units units);

struct PlanOptions {
  std::string method = "vecinfer";
  double bits = 2.0;  // effective bits on average: scales and norms count
  Units units = Units::kUniform;
  std::uint64_t seed = 0;
  int context = 0;                // tokens at which bits are counted; 0: the model's maximum.  They are the same at any
  bool quantize_sliding = false;  // also layers with a sliding window, counted as if they kept all tokens
};

/// Plan::sliding: the layers with a sliding window, or none where they are quantised too.
std::vector<SlidingLayer> sliding_layers(const ModelConfig& config, bool quantize_sliding);

/// Throws std::invalid_argument where that leaves no layer.
void check_stored_layers(const ModelConfig& config, bool quantize_sliding);

/// Whether make_plan looks at samples at all: one width of a quantizer that does not learn needs none.
bool reads_samples(const PlanOptions& options);

/// Throws as make_plan would, before any sample is made: std::invalid_argument if the method cannot store heads of the model's
/// head_dim, if `bits` lies outside what it offers for them (says the range), for rotated_pq and units other than kUniform and
/// kLayer, or if `num_samples` of `length` tokens are more than check_batch_size() accepts, or give fewer vectors than the method
/// is fitted to.
void check_plan_options(const ModelConfig& config, const PlanOptions& options, int num_samples, int length);

/// Gives bits to units, fits their quantizers to the keys (after RoPE) and values of `samples`, and fills everything of a plan but
/// its provenance's source of text.  `samples` may be empty where reads_samples() says no.
///
/// kUniform takes the largest width within `bits`; where that stays below, a warning says what other widths give.  kLayer measures
/// sensitivities and gives the bits that minimise predicted KL: for scalar quantizers by the documented way (distortion curve, then
/// integer widths), for `vecinfer` by the distortion that each width is measured to have.
///
/// Throws as check_plan_options does.
Plan make_plan(const LanguageModel& model, const TokenBatch& samples, const PlanOptions& options,
               const ProgressCallback& progress = {});

}  // namespace veloxquant
