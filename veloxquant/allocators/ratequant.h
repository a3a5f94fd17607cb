// RateQuant (arXiv 2605.06675): sensitivity → distortion curve → bits.
//
//     const auto sensitivities = allocators::ratequant::calibrate_layer_sensitivities(model, tokenizer);
//     const auto curves = allocators::ratequant::fit_distortion_curve(sensitivities);
//     const auto bits = allocators::ratequant::allocate_bits_ratequant(curves, 2.0);
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "veloxquant/core/progress.h"
#include "veloxquant/model/language_model.h"
#include "veloxquant/plan/allocation.h"
#include "veloxquant/plan/distortion_curve.h"
#include "veloxquant/plan/sensitivity.h"
#include "veloxquant/text/text_encoder.h"

namespace veloxquant::allocators {

/// What the documented functions take beside their documented parameters.
struct CalibrationOptions {
  std::vector<std::string> texts;  // UTF-8 texts to read; none: the model's own
  std::uint64_t seed = 0;
  ProgressCallback progress;
};

namespace ratequant {

using veloxquant::allocate_bits_ratequant;
using veloxquant::DistortionCurve;
using veloxquant::fit_distortion_curve;
using veloxquant::LayerMap;
using veloxquant::SensitivityResult;

/// Perturbs the keys (after RoPE) and values of one layer at a time with Gaussian noise of noise_scale times their standard
/// deviation and measures the output change √(2·KL) of each of num_samples samples of sequence_length tokens → by layer its mean
/// and standard deviation over samples, divided by noise_scale, and the distortions of the quantizers on the same keys and values.
///
/// device: "gpu" or "cpu"; "gpu" without a GPU back end warns once and runs on the CPU.
/// Throws std::invalid_argument for another device, counts below 1, a noise_scale that is not above 0, and texts that are too
/// short.
LayerMap<SensitivityResult> calibrate_layer_sensitivities(const LanguageModel& model, const TextEncoder& tokenizer,
                                                          int num_samples = 32, int sequence_length = 512, double noise_scale = 0.1,
                                                          const std::string& device = "gpu",
                                                          const CalibrationOptions& options = {});

}  // namespace ratequant
}  // namespace veloxquant::allocators
