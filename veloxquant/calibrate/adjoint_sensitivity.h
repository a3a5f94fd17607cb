// The sensitivities of all layers and units from one backward pass, instead of a perturbed stream for each layer.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "veloxquant/core/progress.h"
#include "veloxquant/model/language_model.h"
#include "veloxquant/plan/layer_map.h"
#include "veloxquant/plan/sensitivity.h"
#include "veloxquant/quantize/registry.h"
#include "veloxquant/text/samples.h"

namespace veloxquant {

/// Predicted KL of storing a unit with rotated_pq.
struct WidthCost {
  double bits;          // of codes an element
  double predicted_kl;  // nats a token
};

struct UnitSensitivity {
  int layer, head;
  Side side;
  double sensitivity;  // output change, √(2·KL), per unit of white noise relative to the deviation of the layer's keys (values)
  std::vector<WidthCost> widths;
};

struct AdjointSensitivities {
  LayerMap<SensitivityResult> layers;  // as the perturbing probe gives them
  std::vector<UnitSensitivity> units;  // keys of all heads, then values, of layer 0, then of layer 1, …
};

struct AdjointProbeOptions {
  int window = 0;  // recent tokens that will be stored exactly
  std::uint64_t seed = 0;
};

/// White noise of deviation σ in stored vectors costs ½σ²·E‖g‖² nats, g the gradients by them (calibrate/gradients.h); a layer's
/// mean and standard deviation are over samples, and its distortions are those of the scalar quantizers on its keys (after RoPE)
/// and values.  Throws as likelihood_gradients does.
AdjointSensitivities adjoint_sensitivities(const LanguageModel& model, const TokenBatch& samples,
                                           const AdjointProbeOptions& options, const ProgressCallback& progress = {});

/// to_json() of the layers with a field "units": [{"layer", "side", "head", "sensitivity", "widths": [{"bits", "predicted_kl"}]}].
nlohmann::ordered_json to_json(const AdjointSensitivities& sensitivities);

}  // namespace veloxquant
