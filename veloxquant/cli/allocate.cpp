#include <fmt/format.h>

#include "veloxquant/cli/commands.h"
#include "veloxquant/cli/options.h"
#include "veloxquant/cli/terminal.h"
#include "veloxquant/core/error.h"
#include "veloxquant/core/json.h"
#include "veloxquant/plan/allocation.h"
#include "veloxquant/plan/distortion_curve.h"
#include "veloxquant/plan/sensitivity.h"

namespace veloxquant::cli {
namespace {

struct Options {
  std::string sensitivities, quantizer = "turboquant";
  double bits = 2.0;
  int min_bits = 1, max_bits = 4;
  RunOptions run;
  bool json = false;
};

void check(const Options& options) {
  if (options.min_bits > options.max_bits)
    throw_invalid("allocate", "--min-bits: expected at most --max-bits, {}, got {}", options.max_bits, options.min_bits);
  if (options.bits < options.min_bits || options.bits > options.max_bits)
    throw_invalid("allocate", "--bits: expected {} to {} (--min-bits to --max-bits), got {}", options.min_bits, options.max_bits,
                  options.bits);
}

LayerMap<DistortionCurve> curves_of(const LayerMap<SensitivityResult>& results, const Options& options) try {
  return fit_distortion_curve(results, {1.0, 1.5, 2.0, 3.0, 4.0}, options.quantizer);
} catch (const std::invalid_argument& error) {
  throw_failure("allocate", "{}: {}", options.sensitivities, error.what());
}

void run(const Options& options) {
  check(options);
  const auto results = sensitivities_from_json(read_json(options.sensitivities), options.sensitivities);
  const auto curves = curves_of(results, options);
  const auto bits = allocate_bits_ratequant(curves, options.bits, options.min_bits, options.max_bits);
  if (options.json) return print_json(nlohmann::ordered_json(nlohmann::ordered_json::object_t(bits.begin(), bits.end())));
  std::vector<std::vector<std::string>> rows = {{"layer", "bits", "sensitivity", "alpha", "beta", "predicted KL"}};
  double total = 0, sum = 0;
  for (const auto& [name, width] : bits) {
    const auto& curve = curves.at(name);
    rows.push_back({name, std::to_string(width), fmt::format("{:.4f}", results.at(name).mean_sensitivity),
                    fmt::format("{:.4f}", curve.alpha), fmt::format("{:.3f}", curve.beta), fmt::format("{:.5f}", curve(width))});
    total += curve(width);
    sum += width;
  }
  rows.push_back({"all", fmt::format("{:.3f}", sum / static_cast<double>(bits.size())), "", "", "", fmt::format("{:.5f}", total)});
  fmt::print("{}", table(rows));
  fmt::print(
      "\nBits of codes; scales and norms come on top.\nNext: veloxquant calibrate MODEL --method {} --units layer -o "
      "plan.safetensors\n",
      options.quantizer);
}

}  // namespace

void add_allocate(CLI::App& program) {
  auto options = std::make_shared<Options>();
  CLI::App& command = *program.add_subcommand("allocate", "Give bits to layers from saved sensitivities, without a model");
  command.footer("Example: veloxquant allocate sensitivities.json --bits 2 --quantizer turboquant");
  command.add_option("sensitivities", options->sensitivities, "What sensitivity --json printed")->required();
  command.add_option("--bits", options->bits, "Average bits of codes per element")->check(positive_number())->capture_default_str();
  command.add_option("--min-bits", options->min_bits, "Least bits of a layer")->check(whole_number(1, 16))->capture_default_str();
  command.add_option("--max-bits", options->max_bits, "Most bits of a layer")->check(whole_number(1, 16))->capture_default_str();
  command.add_option("--quantizer", options->quantizer, "Whose measured distortions to use")
      ->check(CLI::IsMember(scalar_quantizer_names()))
      ->capture_default_str();
  options->run.add_to(command, kNoEffect);
  add_json_flag(command, options->json);
  command.callback([options] { run(*options); });
}

}  // namespace veloxquant::cli
