#include <fmt/format.h>

#include "veloxquant/cli/commands.h"
#include "veloxquant/cli/options.h"
#include "veloxquant/plan/plan_file.h"
#include "veloxquant/plan/plan_summary.h"

namespace veloxquant::cli {

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
    fmt::print("{}", plan_summary(plan));
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
