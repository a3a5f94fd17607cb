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

}  // namespace

void print_plan(const Plan& plan) {
  const auto& model = plan.model;
  const auto& from = plan.provenance;
  fmt::print("model       {}, {} layers, {} KV heads of {}\n", model.architecture, model.num_layers, model.num_kv_heads,
             model.head_dim);
  fmt::print("method      {}, one width {}\n", from.method, from.units == "layer" ? "per layer" : "for all layers");
  std::vector<std::string> names;
  for (const auto& text : from.texts) names.push_back(text.name);
  fmt::print("calibrated  on {}: {} samples of {} tokens, seed {}, {}\n",
             names.empty() ? "the model's own text" : fmt::format("{}", fmt::join(names, ", ")), from.num_samples,
             from.sequence_length, from.seed, from.device);
  fmt::print("bits        {:.4g} per element, everything stored per token counted; {} of codebooks beside\n", effective_bits(plan),
             bytes_text(constant_bytes(plan)));
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
    bool json = false;
  };
  auto options = std::make_shared<Options>();
  CLI::App& command = *program.add_subcommand("inspect", "Show what a plan says, its bits and bytes");
  command.footer("Example: veloxquant inspect plan.safetensors");
  command.add_option("plan", options->plan, "Plan file")->required();
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
    bool json = false;
  };
  auto options = std::make_shared<Options>();
  CLI::App& command = *program.add_subcommand("verify", "Check that a plan is whole, and that it fits a model");
  command.footer("Example: veloxquant verify plan.safetensors --model MODEL");
  command.add_option("plan", options->plan, "Plan file")->required();
  command.add_option("--model", options->model, "Model folder that the plan should be for");
  add_json_flag(command, options->json);
  command.callback([options] {
    const Plan plan = read_plan(options->plan);
    if (!options->model.empty()) check_identity(plan, Model::load(options->model).identity());
    if (options->json) return print_json({{"plan", options->plan}, {"ok", true}, {"model_checked", !options->model.empty()}});
    fmt::print("{}: whole, {} units{}\n", options->plan, plan.units.size(), options->model.empty() ? "" : ", made for this model");
  });
}

}  // namespace veloxquant::cli
