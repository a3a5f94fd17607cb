#include <fmt/format.h>

#include <optional>

#include "veloxquant/allocators/ratequant.h"
#include "veloxquant/cli/commands.h"
#include "veloxquant/cli/options.h"
#include "veloxquant/cli/terminal.h"
#include "veloxquant/core/file.h"

namespace veloxquant::cli {
namespace {

struct Options {
  std::string model, method = "perturb";
  std::optional<std::string> output;
  double noise_scale = 0.1;
  SampleOptions samples;
  TextOptions text;
  RunOptions run;
  bool json = false;
};

void run(const Options& options) {
  if (options.output) check_writable(*options.output);
  const DeviceScope scope = options.run.enter();
  const LoadedModel loaded = load_model(options.model);
  const auto results = allocators::ratequant::calibrate_layer_sensitivities(
      loaded.model, loaded.tokenizer, options.samples.num_samples, options.samples.length, options.noise_scale,
      std::string(device_name(mx::default_device())),
      {.texts = options.text.read(), .seed = options.run.seed, .progress = terminal_progress()});
  clear_progress();
  const auto json = to_json(results);
  if (options.output) write_file_atomically(*options.output, json.dump(2) + "\n");
  if (options.json) return print_json(json);
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
  command.add_option("--method", options->method, "perturb: add noise to one layer at a time")
      ->check(CLI::IsMember({"perturb"}))
      ->capture_default_str();
  options->samples.add_to(command);
  command
      .add_option("--noise-scale", options->noise_scale, "Noise, relative to the standard deviation of the layer's keys (values)")
      ->check(positive_number())
      ->capture_default_str();
  options->text.add_to(command);
  options->run.add_to(command);
  add_json_flag(command, options->json);
  command.callback([options] { run(*options); });
}

}  // namespace veloxquant::cli
