#include "veloxquant/allocators/ratequant.h"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "veloxquant/calibrate/sensitivity.h"
#include "veloxquant/core/json.h"
#include "veloxquant/model/noise.h"

namespace veloxquant::python {
namespace {

using namespace allocators;

// Results pass as JSON, which both sides write and read anyway.
std::string sensitivities(const LanguageModel& model, const TextEncoder& tokenizer, int num_samples, int sequence_length,
                          double noise_scale, const std::string& device, const NamedTexts& texts, std::uint64_t seed,
                          nb::object progress) {
  PythonProgress report(std::move(progress));
  const nb::gil_scoped_release release;
  return to_json(ratequant::calibrate_layer_sensitivities(model, tokenizer, num_samples, sequence_length, noise_scale, device,
                                                          {contents(texts), seed, callback_of(report)}))
      .dump();
}

std::string distortions(const FloatArray& keys, const FloatArray& values, int head_dim, int length, std::uint64_t seed) {
  const nb::gil_scoped_release release;
  ProbeOptions options;
  options.seed = seed;
  SensitivityResult result;
  result.layer_name = layer_name(0);
  result.distortions = measure_distortions(span_of(keys), span_of(values), head_dim, length, options);
  return to_json(LayerMap<SensitivityResult>{{result.layer_name, result}})[result.layer_name]["distortions"].dump();
}

using Curve = std::tuple<std::string, double, double, double>;  // layer, alpha, beta, r_squared

std::vector<Curve> curves(const std::string& json, const std::vector<double>& bit_rates, const std::string& quantizer) {
  std::vector<Curve> result;
  const auto results = sensitivities_from_json(parse_json(json, "sensitivities"), "sensitivities");
  for (const auto& [name, curve] : fit_distortion_curve(results, bit_rates, quantizer))
    result.emplace_back(name, curve.alpha, curve.beta, curve.r_squared);
  return result;
}

std::vector<std::pair<std::string, int>> bits(const std::vector<Curve>& curves, double target_bits, int min_bits, int max_bits) {
  LayerMap<DistortionCurve> layers;
  for (const auto& [name, alpha, beta, r_squared] : curves) {
    layer_index(name);  // or it throws
    layers[name] = {name, alpha, beta, r_squared};
  }
  const auto result = allocate_bits_ratequant(layers, target_bits, min_bits, max_bits);
  return {result.begin(), result.end()};
}

}  // namespace

void bind_ratequant(nb::module_& module) {
  module.def("calibrate_layer_sensitivities", &sensitivities, nb::arg("model"), nb::arg("tokenizer"), nb::arg("num_samples"),
             nb::arg("sequence_length"), nb::arg("noise_scale"), nb::arg("device"), nb::arg("texts"), nb::arg("seed"),
             nb::arg("progress").none(), "→ JSON, as the program's command `sensitivity` prints it.");
  module.def("add_gaussian_noise", &add_gaussian_noise, nb::arg("x"), nb::arg("deviation"), nb::arg("seed"),
             "x [B, H, T, D] float32 → with noise of this standard deviation.");
  module.def(
      "noise_seed",
      [](std::uint64_t seed, int layer, int step, const std::string& side) {
        return noise_seed(seed, layer, step, side == "keys" ? Side::kKeys : Side::kValues);
      },
      nb::arg("seed"), nb::arg("layer"), nb::arg("step"), nb::arg("side"),
      "Of the noise on \"keys\" or \"values\" of a step of samples.");
  module.def("measure_distortions", &distortions, nb::arg("keys"), nb::arg("values"), nb::arg("head_dim"), nb::arg("length"),
             nb::arg("seed"), "keys and values of one layer [samples, num_kv_heads, length, head_dim] → JSON by quantizer.");
  module.def("fit_distortion_curve", &curves, nb::arg("sensitivities"), nb::arg("bit_rates"), nb::arg("quantizer"),
             WithoutInterpreter(), "JSON of sensitivities → (layer, alpha, beta, r_squared) by layer.");
  module.def("allocate_bits_ratequant", &bits, nb::arg("curves"), nb::arg("target_bits"), nb::arg("min_bits"), nb::arg("max_bits"),
             WithoutInterpreter(), "(layer, alpha, beta, r_squared) by layer → (layer, bits).");
}

}  // namespace veloxquant::python
