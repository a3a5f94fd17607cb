#include "veloxquant/allocators/ratequant.h"

#include "veloxquant/calibrate/calibration_samples.h"
#include "veloxquant/calibrate/sensitivity.h"
#include "veloxquant/core/error.h"

namespace veloxquant::allocators::ratequant {

LayerMap<SensitivityResult> calibrate_layer_sensitivities(const LanguageModel& model, const TextEncoder& tokenizer, int num_samples,
                                                          int sequence_length, double noise_scale, const std::string& device,
                                                          const CalibrationOptions& options) {
  if (device != "gpu" && device != "cpu")
    throw_invalid("calibrate_layer_sensitivities", "device: expected \"gpu\" or \"cpu\", got \"{}\"", device);
  const DeviceScope scope(resolve_device_or_cpu(device));
  const auto samples =
      calibration_samples(model, tokenizer, options.texts, num_samples, sequence_length, options.seed, options.progress);
  ProbeOptions probe;
  probe.noise_scale = noise_scale;
  probe.seed = options.seed;
  return probe_sensitivities(model, samples, probe, options.progress);
}

}  // namespace veloxquant::allocators::ratequant
