// The program `veloxquant`.

#include <fmt/ranges.h>

#include <cstdio>
#include <cstdlib>
#include <exception>

#include "veloxquant/cli/commands.h"
#include "veloxquant/cli/terminal.h"
#include "veloxquant/core/error.h"
#include "veloxquant/kernels/gemm.h"
#include "veloxquant/model/memory.h"

namespace veloxquant::cli {
namespace {

constexpr int kFailure = 1, kUsage = 2;

int report(std::string_view message, int status = kFailure) {
  clear_progress();
  fmt::print(stderr, "veloxquant: {}\n", message);
  return status;
}

// One line, as all errors.
std::string usage_text(const CLI::App& program, const CLI::ParseError& error) {
  const auto chosen = program.get_subcommands();
  if (!chosen.empty()) return one_line(fmt::format("{} (see veloxquant {} --help)", error.what(), chosen.front()->get_name()));
  std::vector<std::string> names;
  for (const auto* command : program.get_subcommands({})) names.push_back(command->get_name());
  const auto rest = program.remaining();
  return one_line(fmt::format("expected a command, one of {}, got {} (see veloxquant --help)", fmt::join(names, ", "),
                              rest.empty() ? "none" : excerpt(rest.front())));
}

int run(int argc, char** argv) {
  CLI::App program("Decides how a language model's key-value cache is stored in one to four bits.", "veloxquant");
  program.set_version_flag("--version", [] { return fmt::format("veloxquant {}, {}", VELOXQUANT_VERSION, blas_description()); });
  program.require_subcommand(1);
  program.footer("Example: veloxquant calibrate MODEL -o plan.safetensors && veloxquant evaluate MODEL --plan plan.safetensors");
  add_calibrate(program);
  add_evaluate(program);
  add_generate(program);
  add_sensitivity(program);
  add_allocate(program);
  add_inspect(program);
  add_verify(program);
  install_interrupt_handler();
  install_warning_handler();
  try {
    program.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return program.exit(error);  // --help, --version
    return report(usage_text(program, error), kUsage);
  } catch (const Interrupted&) {
    return report("interrupted", kInterruptedStatus);
  } catch (const std::exception& error) {
    return report(out_of_memory(error).value_or(error.what()));
  }
  clear_progress();
  if (std::fflush(stdout) != 0) return report("could not write to standard output");
  return 0;
}

}  // namespace
}  // namespace veloxquant::cli

int main(int argc, char** argv) {
  // On CUDA, MLX multiplies float32 with 10 bits of mantissa unless told otherwise; divergences of 1e-4 nats would drown in that.
  ::setenv("MLX_ENABLE_TF32", "0", /* overwrite= */ 0);
  return veloxquant::cli::run(argc, argv);
}
