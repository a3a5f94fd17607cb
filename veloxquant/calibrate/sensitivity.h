// The documented probe: how much a model's output changes when noise is put into one layer's keys and values.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "veloxquant/core/progress.h"
#include "veloxquant/model/language_model.h"
#include "veloxquant/plan/layer_map.h"
#include "veloxquant/plan/sensitivity.h"
#include "veloxquant/quantize/registry.h"
#include "veloxquant/text/samples.h"

namespace veloxquant {

struct ProbeOptions {
  double noise_scale = 0.1;  // standard deviation of the noise, relative to that of all of a layer's keys (values)
  std::uint64_t seed = 0;

  /// Quantizers whose relative distortion on the same keys and values is measured beside, at these rates (bits of codes an
  /// element).
  std::vector<std::string> quantizers = scalar_quantizer_names();
  std::vector<double> rates = {1.0, 1.5, 2.0, 3.0, 4.0};
};

/// The distortions of every quantizer at every rate on what one layer stores of samples of `length` tokens: keys and values, each
/// [samples, num_kv_heads, length, head_dim].
std::map<std::string, std::vector<DistortionPoint>> measure_distortions(std::span<const float> keys, std::span<const float> values,
                                                                        int head_dim, int length, const ProbeOptions& options);

/// Of the noise that the probe puts into a layer's keys or values of one step of samples (samples_per_step).
std::uint64_t noise_seed(std::uint64_t seed, int layer, int step, Side side);

/// Perturbs the keys (after RoPE) and values of one layer at a time with Gaussian noise and measures the output change of each
/// sample, √(2·KL) with the KL divergence averaged over positions (docs/design.md).  Layers below the perturbed one are not run
/// again, and all samples go through a layer before the next: L · (L + 3) / 2 layer runs for L layers.  Throws
/// std::invalid_argument unless noise_scale > 0 and such noise is finite, std::runtime_error if a change of the output is not.
LayerMap<SensitivityResult> probe_sensitivities(const LanguageModel& model, const TokenBatch& samples, const ProbeOptions& options,
                                                const ProgressCallback& progress = {});

}  // namespace veloxquant
