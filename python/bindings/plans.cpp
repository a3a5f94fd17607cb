#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "veloxquant/calibrate/calibrate.h"
#include "veloxquant/calibrate/gradients.h"
#include "veloxquant/calibrate/make_plan.h"
#include "veloxquant/core/error.h"
#include "veloxquant/model/device.h"
#include "veloxquant/plan/plan_file.h"
#include "veloxquant/plan/plan_summary.h"

namespace veloxquant::python {
namespace {

std::optional<Units> units_of(const std::optional<std::string>& name) {
  if (!name) return std::nullopt;
  for (const Units units : {Units::kUniform, Units::kLayer, Units::kKv, Units::kHead})
    if (*name == to_string(units)) return units;
  throw_invalid("calibrate", "units: expected \"head\", \"kv\", \"layer\" or \"uniform\", got \"{}\"", *name);
}

std::optional<Rotation> rotation_of(const std::optional<std::string>& name) {
  if (!name) return std::nullopt;
  if (*name == "full") return Rotation::kFull;
  if (*name == "plane") return Rotation::kPlane;
  throw_invalid("calibrate", "keys: expected \"full\" or \"plane\", got \"{}\"", *name);
}

bool quantizes_sliding(const std::string& sliding) {
  if (sliding != "full" && sliding != "quantize")
    throw_invalid("calibrate", "sliding: expected \"full\" or \"quantize\", got \"{}\"", sliding);
  return sliding == "quantize";
}

// → (plan, frontier as (bits, predicted KL), recall in full, recall with the plan).
nb::tuple calibrate_plan(const LanguageModel& model, const TextEncoder& tokenizer, const NamedTexts& texts,
                         const std::string& method, double bits, std::optional<std::int64_t> bytes, int context,
                         const std::optional<std::string>& units, const std::optional<std::string>& keys, std::optional<int> window,
                         std::optional<int> sinks, const std::string& sliding, int num_samples, int length, std::uint64_t seed,
                         const std::string& device, nb::object progress) {
  PythonProgress report(std::move(progress));
  const CalibrateOptions options{.method = method,
                                 .bits = bits,
                                 .bytes = bytes,
                                 .context = context,
                                 .units = units_of(units),
                                 .keys = rotation_of(keys),
                                 .window = window,
                                 .sinks = sinks,
                                 .quantize_sliding = quantizes_sliding(sliding),
                                 .num_samples = num_samples,
                                 .length = length,
                                 .seed = seed};
  AdjointPlan made = without_interpreter([&] {
    const DeviceScope scope(resolve_device_or_cpu(device));
    std::vector<NamedText> named;
    for (const auto& [name, text] : texts) named.push_back({name, text});
    return calibrate(model, tokenizer, named, options, callback_of(report));
  });
  nb::list frontier;
  for (const auto& [at, kl] : made.frontier) frontier.append(nb::make_tuple(at, kl));
  return nb::make_tuple(std::move(made.plan), frontier, made.full_recall, made.plan_recall);
}

}  // namespace

void bind_plans(nb::module_& module) {
  nb::class_<Plan>(module, "Plan", "How every unit of a model's cache is stored.")
      .def_static("load", &read_plan, nb::arg("path"), WithoutInterpreter())
      .def("save", &write_plan, nb::arg("path"), WithoutInterpreter())
      .def(
          "describe", [](const Plan& plan) { return describe_plan(plan).dump(); },
          "What the program's command `inspect` prints as JSON.")
      .def("summary", &plan_summary, "What the command `inspect` prints.")
      .def(
          "effective_bits",
          [](const Plan& plan, std::optional<std::int64_t> tokens) {
            return tokens ? effective_bits(plan, *tokens) : effective_bits(plan);
          },
          nb::arg("tokens") = nb::none())
      .def("cache_bytes", &cache_bytes, nb::arg("tokens"))
      .def("constant_bytes", &constant_bytes)
      .def("identity", &plan_identity, WithoutInterpreter())
      .def(
          "check",
          [](const Plan& plan, const std::string& architecture, int num_layers, int num_kv_heads, int head_dim) {
            ModelIdentity model = plan.model;
            model.architecture = architecture;
            model.num_layers = num_layers;
            model.num_kv_heads = num_kv_heads;
            model.head_dim = head_dim;
            check_identity(plan, model);
          },
          nb::arg("architecture"), nb::arg("num_layers"), nb::arg("num_kv_heads"), nb::arg("head_dim"),
          "RuntimeError that names what differs, unless the plan is for a model of this shape.")
      .def("set_hashes",
           [](Plan& plan, const std::string& config, const std::string& weights) {
             plan.model.config_hash = config;
             plan.model.weights_hash = weights;
           })
      .def(
          "__eq__", [](const Plan& a, const Plan& b) { return a == b; }, nb::is_operator());

  module.def(
      "likelihood_gradients",
      [](const LanguageModel& model, const nb::ndarray<const std::int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>& samples,
         int window, std::uint64_t seed, const std::string& device) {
        TokenBatch batch(static_cast<int>(samples.shape(0)), static_cast<int>(samples.shape(1)));
        batch.tokens.assign(samples.data(), samples.data() + samples.size());
        std::vector<std::tuple<int, int, mx::array, mx::array, mx::array, mx::array>> result;
        const nb::gil_scoped_release release;
        const DeviceScope scope(resolve_device_or_cpu(device));
        likelihood_gradients(model, batch, {.window = window, .weights = {}, .seed = seed}, [&](const LayerGradients& step) {
          result.emplace_back(step.layer, step.first_sample, step.keys, step.values, step.key_gradients, step.value_gradients);
        });
        return result;
      },
      nb::arg("model"), nb::arg("samples"), nb::arg("window"), nb::arg("seed"), nb::arg("device"),
      "samples [B, T] int32 → (layer, first sample, keys before RoPE, values, gradients by keys, by values) for every layer and "
      "step.");
  module.def("calibrate", &calibrate_plan, nb::arg("model"), nb::arg("tokenizer"), nb::arg("texts"), nb::arg("method"),
             nb::arg("bits"), nb::arg("bytes").none(), nb::arg("context"), nb::arg("units").none(), nb::arg("keys").none(),
             nb::arg("window").none(), nb::arg("sinks").none(), nb::arg("sliding"), nb::arg("num_samples"), nb::arg("length"),
             nb::arg("seed"), nb::arg("device"), nb::arg("progress").none(),
             "→ (plan, frontier as (bits, predicted KL), recall in full, recall with the plan).");
}

}  // namespace veloxquant::python
