#include <fmt/format.h>

#include <algorithm>
#include <optional>

#include "veloxquant/allocators/ratequant.h"
#include "veloxquant/calibrate/adjoint_sensitivity.h"
#include "veloxquant/calibrate/calibration_samples.h"
#include "veloxquant/cli/commands.h"
#include "veloxquant/cli/options.h"
#include "veloxquant/cli/terminal.h"
#include "veloxquant/core/error.h"
#include "veloxquant/core/file.h"
#include "veloxquant/plan/plan_summary.h"

namespace veloxquant::cli {
namespace {

constexpr double kNoiseScale = 0.1;

struct Options {
  std::string model, method = "perturb";
  std::optional<std::string> output;
  std::optional<double> noise_scale;
  std::optional<int> window;
  SampleOptions samples;
  TextOptions text;
  RunOptions run;
  bool json = false;
};

void print_layers(const LayerMap<SensitivityResult>& results) {
  std::vector<std::vector<std::string>> rows = {{"layer", "sensitivity", "± over samples", "distortion of TurboQuant at 2 bits"}};
  for (const auto& [name, result] : results) {
    std::string distortion;
    for (const auto& point : result.distortions.at("turboquant"))
      if (point.rate == 2) distortion = fmt::format("{:.4f}", (point.keys + point.values) / 2);
    rows.push_back(
        {name, fmt::format("{:.4f}", result.mean_sensitivity), fmt::format("{:.4f}", result.std_sensitivity), distortion});
  }
  fmt::print("{}", table(rows));
  fmt::print("\nSensitivity: change of the output, √(2·KL), per unit of relative noise in a layer's keys and values.\n");
}

// Predicted KL of each unit at some widths, those that cost most first.
void print_units(std::vector<UnitSensitivity> units) {
  constexpr std::size_t kShown = 12;
  const auto cost = [](const UnitSensitivity& unit) { return unit.widths[unit.widths.size() / 2].predicted_kl; };
  std::stable_sort(units.begin(), units.end(), [&](const auto& a, const auto& b) { return cost(a) > cost(b); });
  std::vector<std::vector<std::string>> rows = {{"unit", "sensitivity"}};
  for (const auto& [bits, kl] : units[0].widths) rows[0].push_back(fmt::format("{:.3g} bits", bits));
  for (std::size_t i = 0; i < std::min(units.size(), kShown); ++i) {
    const auto& unit = units[i];
    rows.push_back({unit_name(unit.layer, unit.side, unit.head), fmt::format("{:.4f}", unit.sensitivity)});
    for (const auto& [bits, kl] : unit.widths) rows.back().push_back(fmt::format("{:.6f}", kl));
  }
  fmt::print("\n{}\nPredicted KL, nats a token, of storing one unit with rotated_pq at these bits of codes; {} of {} units.\n",
             table(rows), rows.size() - 1, units.size());
}

void run(const Options& options) {
  if (options.output) check_writable(*options.output);
  if (options.window && options.method != "adjoint")
    throw_invalid("sensitivity", "--window: only for --method adjoint, got {}", options.method);
  if (options.noise_scale && options.method != "perturb")
    throw_invalid("sensitivity", "--noise-scale: only for --method perturb, got {}", options.method);
  const DeviceScope scope = options.run.enter();
  const LoadedModel loaded = load_model(options.model);
  const auto texts = options.text.read();
  const auto progress = terminal_progress();
  AdjointSensitivities results;
  if (options.method == "adjoint") {
    const auto samples = calibration_samples(loaded.model, loaded.tokenizer, texts, options.samples.num_samples,
                                             options.samples.length, options.run.seed, progress);
    results =
        adjoint_sensitivities(loaded.model, samples, {.window = options.window.value_or(0), .seed = options.run.seed}, progress);
  } else {
    results.layers = allocators::ratequant::calibrate_layer_sensitivities(
        loaded.model, loaded.tokenizer, options.samples.num_samples, options.samples.length,
        options.noise_scale.value_or(kNoiseScale), std::string(device_name(mx::default_device())),
        {.texts = texts, .seed = options.run.seed, .progress = progress});
  }
  clear_progress();
  const auto json = results.units.empty() ? to_json(results.layers) : to_json(results);
  if (options.output) write_file_atomically(*options.output, json.dump(2) + "\n");
  if (options.json) return print_json(json);
  print_layers(results.layers);
  if (!results.units.empty()) print_units(std::move(results.units));
  if (options.output) {
    fmt::print("Next: veloxquant allocate {} --bits 2\n", shell_word(*options.output));
  } else {
    fmt::print("Next: veloxquant sensitivity {} -o sensitivities.json && veloxquant allocate sensitivities.json --bits 2\n",
               shell_word(options.model));
  }
}

}  // namespace

void add_sensitivity(CLI::App& program) {
  auto options = std::make_shared<Options>();
  CLI::App& command = *program.add_subcommand("sensitivity", "Measure how much each layer minds noise in its keys and values");
  command.footer("Example: veloxquant sensitivity MODEL --json > sensitivities.json");
  command.add_option("model", options->model, "Model folder: config.json, *.safetensors, tokenizer.json")->required();
  command.add_option("-o,--output", options->output, "Also write the JSON to this file");
  command
      .add_option("--method", options->method,
                  "perturb: add noise to one layer at a time; adjoint: one backward pass for all layers and units")
      ->check(CLI::IsMember({"perturb", "adjoint"}))
      ->capture_default_str();
  options->samples.add_to(command);
  command
      .add_option(
          "--noise-scale", options->noise_scale,
          fmt::format("perturb: noise, relative to the standard deviation of the layer's keys (values) (default: {})", kNoiseScale))
      ->check(positive_number());
  command.add_option("--window", options->window, "adjoint: recent tokens that will be stored exactly (default: 0)")
      ->check(whole_number(0, 65536));
  options->text.add_to(command);
  options->run.add_to(command);
  add_json_flag(command, options->json);
  command.callback([options] { run(*options); });
}

}  // namespace veloxquant::cli
