#include <filesystem>

#include "veloxquant/calibrate/calibration_samples.h"
#include "veloxquant/calibrate/make_plan.h"
#include "veloxquant/cli/commands.h"
#include "veloxquant/cli/options.h"
#include "veloxquant/cli/terminal.h"
#include "veloxquant/core/error.h"
#include "veloxquant/core/file.h"
#include "veloxquant/core/hash.h"
#include "veloxquant/plan/plan_file.h"

namespace veloxquant::cli {
namespace {

struct Options {
  std::string model, output, method = "vecinfer", units;
  double bits = 2.0;
  int window = 0, sinks = 0, context = 0;
  SampleOptions samples;
  TextOptions text;
  RunOptions run;
  bool json = false;
};

Units units_of(const Options& options) {
  if (options.units.empty()) return quantizer_method(options.method).learns() ? Units::kUniform : Units::kLayer;
  return options.units == "layer" ? Units::kLayer : Units::kUniform;
}

void run(const Options& options) {
  check_writable(options.output);
  const DeviceScope scope = options.run.enter();
  const LoadedModel loaded = load_model(options.model);
  const auto texts = options.text.read();
  const PlanOptions wanted{.method = options.method,
                           .bits = options.bits,
                           .units = units_of(options),
                           .seed = options.run.seed,
                           .context = options.context};
  check_plan_options(loaded.model.config(), wanted, options.samples.num_samples, options.samples.length);
  const auto progress = terminal_progress();
  const bool reads = reads_samples(wanted);
  const TokenBatch samples = reads ? calibration_samples(loaded.model, loaded.tokenizer, texts, options.samples.num_samples,
                                                         options.samples.length, options.run.seed, progress)
                                   : TokenBatch(0, 0);
  Plan plan = make_plan(loaded.model, samples, wanted, progress);
  for (std::size_t i = 0; reads && i < texts.size(); ++i)
    plan.provenance.texts.push_back({std::filesystem::path(options.text.files[i]).filename().string(), sha256(texts[i])});
  write_plan(plan, options.output);
  clear_progress();
  if (options.json) return print_json(describe_plan(plan));
  print_plan(plan);
  fmt::print("\nWrote {} ({}).\nNext: veloxquant evaluate {} --plan {} --peer mlx4\n", options.output,
             bytes_text(std::filesystem::file_size(options.output)), shell_word(options.model), shell_word(options.output));
}

}  // namespace

void add_calibrate(CLI::App& program) {
  auto options = std::make_shared<Options>();
  CLI::App& command = *program.add_subcommand("calibrate", "Make a plan: how every layer's keys and values are stored");
  command.footer("Example: veloxquant calibrate MODEL --bits 2 -o plan.safetensors");
  command.add_option("model", options->model, "Model folder: config.json, *.safetensors, tokenizer.json")->required();
  command.add_option("-o,--output", options->output, "Plan file to write")->required();
  command.add_option("--bits", options->bits, "Effective bits per element on average: everything stored per token counts")
      ->check(positive_number())
      ->capture_default_str();
  command
      .add_option("--context", options->context,
                  "Context at which bits are counted (default: the model's maximum); without window and sinks the same at any")
      ->check(whole_number(1));
  command.add_option("--method", options->method, "Quantizer")->check(CLI::IsMember(quantizer_names()))->capture_default_str();
  command
      .add_option("--units", options->units,
                  "What gets one width: each layer, or all (default: layer; uniform where codebooks are trained)")
      ->check(CLI::IsMember({"layer", "uniform"}));
  options->samples.add_to(command);
  command.add_option("--window", options->window, "Recent tokens kept at 8 bits; only 0 so far")
      ->check(whole_number(0, 0))
      ->capture_default_str();
  command.add_option("--sinks", options->sinks, "First tokens kept at 8 bits; only 0 so far")
      ->check(whole_number(0, 0))
      ->capture_default_str();
  options->text.add_to(command);
  options->run.add_to(command);
  add_json_flag(command, options->json);
  command.callback([options] { run(*options); });
}

}  // namespace veloxquant::cli
