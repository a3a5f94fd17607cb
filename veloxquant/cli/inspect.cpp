#include <fmt/ranges.h>

#include <algorithm>
#include <map>
#include <numeric>

#include "veloxquant/cli/commands.h"
#include "veloxquant/cli/options.h"
#include "veloxquant/cli/terminal.h"
#include "veloxquant/plan/layer_map.h"
#include "veloxquant/plan/plan_file.h"

namespace veloxquant::cli {
namespace {

double bits_of(const UnitPlan& unit) {
  return make_quantizer(unit.quantizer)->rate();
}

// Of the units of one side of a layer: the mean, and the range where they differ.
std::string side_bits(const Plan& plan, int layer, Side side) {
  std::vector<double> bits;
  for (const auto& unit : plan.units)
    if (unit.layer == layer && unit.side == side) bits.push_back(bits_of(unit));
  const auto [low, high] = std::minmax_element(bits.begin(), bits.end());
  const double mean = std::accumulate(bits.begin(), bits.end(), 0.0) / static_cast<double>(bits.size());
  if (*low == *high) return fmt::format("{:.4g}", mean);
  if (bits.size() <= 4) return fmt::format("{:.3g}", fmt::join(bits, " / "));
  return fmt::format("{:.3g} ({:.3g} to {:.3g})", mean, *low, *high);
}

std::string units_text(const std::string& units) {
  static const std::map<std::string, std::string> words = {{"uniform", "one width for all layers"},
                                                           {"layer", "a width per layer"},
                                                           {"kv", "a width for each layer's keys and one for its values"},
                                                           {"head", "a width for each head's keys and one for its values"}};
  return words.at(units);
}

std::string exact_text(const Plan& plan) {
  if (plan.window + plan.sinks == 0) return "";
  return fmt::format("; the last {} and first {} tokens at 8 bits", plan.window, plan.sinks);
}

// The units that lose most, where that was predicted for each.
void print_units_at_stake(const Plan& plan) {
  constexpr std::size_t kShown = 8;
  std::vector<const UnitPlan*> units;
  for (const auto& unit : plan.units)
    if (unit.predicted_kl) units.push_back(&unit);
  if (units.empty()) return;
  std::stable_sort(units.begin(), units.end(), [](const auto* a, const auto* b) { return *a->predicted_kl > *b->predicted_kl; });
  units.resize(std::min(units.size(), kShown));
  std::vector<std::vector<std::string>> rows = {{"most at stake", "bits", "predicted KL"}};
  for (const auto* unit : units)
    rows.push_back({unit_name(unit->layer, unit->side, unit->head), fmt::format("{:.3g}", bits_of(*unit)),
                    fmt::format("{:.6f}", *unit->predicted_kl)});
  fmt::print("\n{}", table(rows));
}

std::string samples_text(const Provenance& from) {
  if (from.num_samples == 0) return "without samples, which would not change it";
  std::vector<std::string> names;
  // rotated_pq mixes the user's texts with the model's own (calibration_set).
  if (from.texts.empty() || from.method == "rotated_pq") names.push_back("the model's own text");
  for (const auto& text : from.texts) names.push_back(text.name);
  return fmt::format("on {}: {} samples of {} tokens", fmt::join(names, ", "), from.num_samples, from.sequence_length);
}

}  // namespace

void print_plan(const Plan& plan) {
  const auto& model = plan.model;
  const auto& from = plan.provenance;
  fmt::print("model       {}, {} layers, {} KV heads of {}\n", model.architecture, model.num_layers, model.num_kv_heads,
             model.head_dim);
  fmt::print("method      {}, {}{}\n", from.method, units_text(from.units), exact_text(plan));
  fmt::print("calibrated  {}, seed {}, {}\n", samples_text(from), from.seed, from.device);
  fmt::print("bits        {:.4g} per element at {} tokens, everything stored per token counted; {} of codebooks beside\n",
             effective_bits(plan), from.context, bytes_text(constant_bytes(plan)));
  constexpr std::int64_t kTokens = 32768;
  fmt::print("memory      {} at 32,768 tokens, {:.4g} bits per element (at 16 bits: {}); each further token {:.0f} bytes\n",
             bytes_text(static_cast<std::size_t>(cache_bytes(plan, kTokens))), effective_bits(plan, kTokens),
             bytes_text(static_cast<std::size_t>(full_bytes(plan, kTokens))), bytes_per_token(plan));
  if (!plan.sliding.empty())
    fmt::print("sliding     {} layers keep the tokens of their window at full precision: {} beside, not in the bits; {} together\n",
               plan.sliding.size(), bytes_text(static_cast<std::size_t>(sliding_bytes(model, plan.sliding, kTokens))),
               bytes_text(static_cast<std::size_t>(sliding_bytes(model, plan.sliding, kTokens) + cache_bytes(plan, kTokens))));
  if (plan.predicted_kl) fmt::print("predicted   KL {:.4f} nats a token\n", *plan.predicted_kl);
  std::vector<std::vector<std::string>> rows = {{"layer", "keys", "values"}};
  for (int layer = 0; layer < model.num_layers; ++layer) {
    const auto slides =
        std::find_if(plan.sliding.begin(), plan.sliding.end(), [layer](const auto& some) { return some.layer == layer; });
    if (slides != plan.sliding.end()) {
      rows.push_back({layer_name(layer), fmt::format("full, last {}", slides->window), "full"});
      continue;
    }
    rows.push_back({layer_name(layer), side_bits(plan, layer, Side::kKeys), side_bits(plan, layer, Side::kValues)});
  }
  fmt::print("\n{}", table(rows));
  print_units_at_stake(plan);
}

void add_inspect(CLI::App& program) {
  struct Options {
    std::string plan;
    RunOptions run;
    bool json = false;
  };
  auto options = std::make_shared<Options>();
  CLI::App& command = *program.add_subcommand("inspect", "Show what a plan says, its bits and bytes");
  command.footer("Example: veloxquant inspect plan.safetensors");
  command.add_option("plan", options->plan, "Plan file")->required();
  options->run.add_to(command, kNoEffect);
  add_json_flag(command, options->json);
  command.callback([options] {
    const Plan plan = read_plan(options->plan);
    if (options->json) return print_json(describe_plan(plan));
    print_plan(plan);
  });
}

void add_verify(CLI::App& program) {
  struct Options {
    std::string plan, model;
    RunOptions run;
    bool json = false;
  };
  auto options = std::make_shared<Options>();
  CLI::App& command = *program.add_subcommand("verify", "Check that a plan is whole, and that it fits a model");
  command.footer("Example: veloxquant verify plan.safetensors --model MODEL");
  command.add_option("plan", options->plan, "Plan file")->required();
  command.add_option("--model", options->model, "Model folder that the plan should be for");
  options->run.add_to(command, kNoEffect);
  add_json_flag(command, options->json);
  command.callback([options] {
    const bool for_model = !options->model.empty();
    const Plan plan =
        for_model ? read_plan_for(Model::load(options->model), options->model, options->plan) : read_plan(options->plan);
    if (options->json) return print_json({{"plan", options->plan}, {"ok", true}, {"model_checked", for_model}});
    fmt::print("{}: whole, {} units{}\n", options->plan, plan.units.size(),
               for_model ? ", made for a model of the same architecture and shapes" : "");
  });
}

}  // namespace veloxquant::cli
