#include <fmt/ranges.h>

#include "veloxquant/cli/commands.h"
#include "veloxquant/cli/options.h"
#include "veloxquant/cli/terminal.h"
#include "veloxquant/plan/layer_map.h"
#include "veloxquant/plan/plan_file.h"

namespace veloxquant::cli {
namespace {

std::string unit_bits(const UnitPlan& unit) {
  return fmt::format("{:.4g}", make_quantizer(unit.quantizer)->rate());
}

std::string samples_text(const Provenance& from) {
  if (from.num_samples == 0) return "without samples, which would not change it";
  std::vector<std::string> names;
  for (const auto& text : from.texts) names.push_back(text.name);
  return fmt::format("on {}: {} samples of {} tokens",
                     names.empty() ? "the model's own text" : fmt::format("{}", fmt::join(names, ", ")), from.num_samples,
                     from.sequence_length);
}

}  // namespace

void print_plan(const Plan& plan) {
  const auto& model = plan.model;
  const auto& from = plan.provenance;
  fmt::print("model       {}, {} layers, {} KV heads of {}\n", model.architecture, model.num_layers, model.num_kv_heads,
             model.head_dim);
  fmt::print("method      {}, one width {}\n", from.method, from.units == "layer" ? "per layer" : "for all layers");
  fmt::print("calibrated  {}, seed {}, {}\n", samples_text(from), from.seed, from.device);
  fmt::print("bits        {:.4g} per element at {} tokens, everything stored per token counted; {} of codebooks beside\n",
             effective_bits(plan), from.context, bytes_text(constant_bytes(plan)));
  const double per_token = bytes_per_token(plan), full = 2.0 * 2 * model.num_layers * model.num_kv_heads * model.head_dim;
  fmt::print("memory      {:.0f} bytes a token, {} at 32,768 tokens (16 bits: {:.0f} and {})\n", per_token,
             bytes_text(static_cast<std::size_t>(per_token * 32768)), full, bytes_text(static_cast<std::size_t>(full * 32768)));
  if (plan.predicted_kl) fmt::print("predicted   KL {:.4f} nats a token\n", *plan.predicted_kl);
  std::vector<std::vector<std::string>> rows = {{"layer", "keys", "values"}};
  for (std::size_t i = 0; i + 1 < plan.units.size(); i += 2)
    rows.push_back({layer_name(plan.units[i].layer), unit_bits(plan.units[i]), unit_bits(plan.units[i + 1])});
  fmt::print("\n{}", table(rows));
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
