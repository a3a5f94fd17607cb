#include "veloxquant/calibrate/calibrate.h"

#include <filesystem>
#include <optional>

#include "veloxquant/calibrate/make_plan.h"
#include "veloxquant/cli/commands.h"
#include "veloxquant/cli/options.h"
#include "veloxquant/cli/terminal.h"
#include "veloxquant/core/error.h"
#include "veloxquant/core/file.h"
#include "veloxquant/plan/plan_file.h"
#include "veloxquant/plan/plan_summary.h"

namespace veloxquant::cli {
namespace {

// PLAN with .frontier.json.
constexpr const char* kBesideThePlan = ".";

struct Options {
  std::string model, output, method = "rotated_pq";
  double bits = 2.0;
  std::optional<std::string> units, keys, frontier;
  std::optional<std::int64_t> bytes;
  std::optional<int> window, sinks;
  std::string sliding = "full";
  int context = 0;
  SampleOptions samples{0, 0};
  TextOptions text;
  RunOptions run;
  bool json = false;
};

bool is_rotated(const Options& options) {
  return options.method == "rotated_pq";
}

std::optional<Units> units_of(const Options& options) {
  for (const Units units : {Units::kUniform, Units::kLayer, Units::kKv, Units::kHead})
    if (options.units == to_string(units)) return units;
  return std::nullopt;
}

std::filesystem::path frontier_path(const Options& options) {
  if (*options.frontier != kBesideThePlan) return *options.frontier;
  return std::filesystem::path(options.output).replace_extension(".frontier.json");
}

nlohmann::ordered_json to_json(const std::vector<FrontierPoint>& frontier) {
  auto json = nlohmann::ordered_json::array();
  for (const auto& [bits, kl] : frontier) json.push_back({{"bits", bits}, {"predicted_kl", kl}});
  return json;
}

// Some of the points, at even distances in bits.
void print_frontier(const std::vector<FrontierPoint>& frontier) {
  constexpr int kRows = 12;
  std::vector<std::vector<std::string>> rows = {{"bits", "predicted KL"}};
  double next = frontier.front().bits;
  const double step = (frontier.back().bits - next) / kRows;
  for (const auto& [bits, kl] : frontier) {
    if (bits < next) continue;
    rows.push_back({fmt::format("{:.3f}", bits), fmt::format("{:.5f}", kl)});
    next = bits + step;
  }
  fmt::print("\n{}", table(rows));
}

nlohmann::ordered_json optional_number(const std::optional<double>& value) {
  return value ? nlohmann::ordered_json(*value) : nlohmann::ordered_json(nullptr);
}

void report(const Options& options, const AdjointPlan& made, const std::string& frontier_file) {
  const Plan& plan = made.plan;
  if (options.json) {
    auto json = describe_plan(plan);
    if (is_rotated(options))
      json["recall"] = {{"full", optional_number(made.full_recall)}, {"plan", optional_number(made.plan_recall)}};
    if (options.frontier) json["frontier"] = to_json(made.frontier);
    return print_json(json);
  }
  fmt::print("{}", plan_summary(plan));
  if (made.full_recall && *made.full_recall > 0)
    fmt::print("\nFacts of the calibration text still answered: {:.1f} % of them, {:.1f} % at full precision.\n",
               100 * *made.plan_recall, 100 * *made.full_recall);
  if (options.frontier) {
    print_frontier(made.frontier);
    fmt::print("\nWrote {}.", frontier_file);
  }
  fmt::print("\nWrote {} ({}).\nNext: veloxquant evaluate {} --plan {} --peer mlx4\n", options.output,
             bytes_text(std::filesystem::file_size(options.output)), shell_word(options.model), shell_word(options.output));
}

void run(const Options& options) {
  check_writable(options.output);
  std::string frontier_file;
  if (options.frontier) {
    if (!is_rotated(options)) throw_invalid("calibrate", "--frontier: only for the method rotated_pq, got {}", options.method);
    frontier_file = frontier_path(options).string();
    check_writable(frontier_file);
    if (std::filesystem::weakly_canonical(frontier_file) == std::filesystem::weakly_canonical(options.output))
      throw_invalid("calibrate", "--frontier: expected another file than that of the plan, got {}", options.output);
  }
  const DeviceScope scope = options.run.enter();
  const LoadedModel loaded = load_model(options.model);
  std::vector<NamedText> texts;
  for (auto& text : options.text.read())
    texts.push_back({std::filesystem::path(options.text.files[texts.size()]).filename().string(), std::move(text)});
  const CalibrateOptions wanted{
      .method = options.method,
      .bits = options.bits,
      .bytes = options.bytes,
      .context = options.context,
      .units = units_of(options),
      .keys = options.keys ? std::optional(*options.keys == "plane" ? Rotation::kPlane : Rotation::kFull) : std::nullopt,
      .window = options.window,
      .sinks = options.sinks,
      .quantize_sliding = options.sliding == "quantize",
      .num_samples = options.samples.num_samples,
      .length = options.samples.length,
      .seed = options.run.seed};
  const AdjointPlan made = calibrate(loaded.model, loaded.tokenizer, texts, wanted, terminal_progress());
  write_plan(made.plan, options.output);
  if (options.frontier) write_file_atomically(frontier_file, to_json(made.frontier).dump(2) + "\n");
  clear_progress();
  report(options, made, frontier_file);
}

}  // namespace

void add_calibrate(CLI::App& program) {
  auto options = std::make_shared<Options>();
  CLI::App& command = *program.add_subcommand("calibrate", "Make a plan: how every head's keys and values are stored");
  command.footer(
      "Example: veloxquant calibrate MODEL --bits 2 -o plan.safetensors\n"
      "         veloxquant calibrate MODEL --bytes 2GiB --context 128k -o plan.safetensors");
  command.add_option("model", options->model, "Model folder: config.json, *.safetensors, tokenizer.json")->required();
  command.add_option("-o,--output", options->output, "Plan file to write")->required();
  auto* bits =
      command.add_option("--bits", options->bits, "Effective bits per element on average: everything stored per token counts")
          ->check(positive_number())
          ->capture_default_str();
  command.add_option("--bytes", options->bytes, "In place of bits: what one sequence of --context tokens may take, such as 2GiB")
      ->transform(byte_count())
      ->excludes(bits);
  command
      .add_option("--context", options->context,
                  "Tokens at which bits and bytes are counted, such as 32k (default: the model's maximum)")
      ->transform(token_count());
  command.add_option("--method", options->method, "Quantizer")->check(CLI::IsMember(quantizer_names()))->capture_default_str();
  command
      .add_option("--units", options->units,
                  "What gets a width of its own: each head's keys and values, each layer's, each layer, or nothing (default: head; "
                  "other methods than rotated_pq: layer, or uniform where they train codebooks)")
      ->check(CLI::IsMember({"head", "kv", "layer", "uniform"}));
  command
      .add_option("--keys", options->keys,
                  "How rotated_pq mixes a key's dimensions: full is the better, plane the faster on CPUs (default: full)")
      ->check(CLI::IsMember({"full", "plane"}));
  command
      .add_option("--window", options->window,
                  fmt::format("Recent tokens that rotated_pq keeps at 8 bits (default: {})", kDefaultWindow))
      ->check(whole_number(0, 65536));
  command
      .add_option("--sinks", options->sinks,
                  fmt::format("First tokens that rotated_pq keeps at 8 bits (default: {})", kDefaultSinks))
      ->check(whole_number(0, 65536));
  command
      .add_option("--sliding", options->sliding,
                  "Layers whose queries see a sliding window: full leaves their last tokens as they are, quantize stores them like "
                  "others")
      ->check(CLI::IsMember({"full", "quantize"}))
      ->capture_default_str();
  // A flag, so that only = gives it a value: the word after it may be the model.
  command.add_flag(fmt::format("--frontier{{{}}}", kBesideThePlan), options->frontier,
                   "Also print predicted KL against bits, and save it as JSON beside the plan, or --frontier=FILE");
  options->samples.add_to(command, "40 of up to 2048 tokens; other methods than rotated_pq: 32 of 512");
  options->text.add_to(command);
  options->run.add_to(command);
  add_json_flag(command, options->json);
  command.callback([options] { run(*options); });
}

}  // namespace veloxquant::cli
