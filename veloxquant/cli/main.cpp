// The program `veloxquant`.

#include <fmt/format.h>

#include <cstdio>
#include <cstdlib>
#include <exception>

#include "veloxquant/cli/commands.h"
#include "veloxquant/cli/terminal.h"
#include "veloxquant/kernels/gemm.h"

namespace veloxquant::cli {
namespace {

constexpr int kFailure = 1, kUsage = 2, kInterrupted = 130;

int report(const char* message) {
  clear_progress();
  fmt::print(stderr, "veloxquant: {}\n", message);
  return kFailure;
}

int run(int argc, char** argv) {
  CLI::App program("Decides how a language model's key-value cache is stored in one to four bits.", "veloxquant");
  program.set_version_flag("--version", [] { return fmt::format("veloxquant {}, {}", VELOXQUANT_VERSION, blas_description()); });
  program.require_subcommand(1);
  program.footer("Example: veloxquant calibrate MODEL -o plan.safetensors && veloxquant evaluate MODEL --plan plan.safetensors");
  add_calibrate(program);
  add_evaluate(program);
  add_sensitivity(program);
  add_allocate(program);
  add_inspect(program);
  add_verify(program);
  install_interrupt_handler();
  install_warning_handler();
  try {
    program.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return program.exit(error) == 0 ? 0 : kUsage;
  } catch (const Interrupted&) {
    report("interrupted");
    return kInterrupted;
  } catch (const std::exception& error) {
    return report(error.what());
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
