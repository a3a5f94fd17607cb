#include "veloxquant/cli/terminal.h"

#include <fmt/format.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>

#include "veloxquant/core/warning.h"

namespace veloxquant::cli {
namespace {

using Clock = std::chrono::steady_clock;

std::atomic<bool> interrupted = false;
bool line_drawn = false;

extern "C" void on_interrupt(int) {
  interrupted = true;
  std::signal(SIGINT, SIG_DFL);
}

std::string time_text(double seconds) {
  const auto whole = static_cast<long>(seconds + 0.5);
  return whole < 60 ? fmt::format("{} s", whole) : fmt::format("{} min {:02} s", whole / 60, whole % 60);
}

// Draws at most ten times a second, and estimates the time left of the stage from its pace so far.
class ProgressLine {
 public:
  void operator()(std::string_view stage, std::size_t done, std::size_t total) {
    if (interrupted) throw Interrupted();
    const auto now = Clock::now();
    if (stage != stage_ || done < done_) start_ = now, stage_ = stage;
    done_ = done;
    if (!on_terminal_ || (now - drawn_ < std::chrono::milliseconds(100) && done < total)) return;
    drawn_ = now;
    line_drawn = true;
    const double seconds = std::chrono::duration<double>(now - start_).count();
    const double share = total > 0 ? static_cast<double>(done) / static_cast<double>(total) : 1.0;
    const int filled = static_cast<int>(share * kWidth);
    const std::string left = done > 0 && done < total ? time_text(seconds * (1 - share) / share) + " left" : "";
    fmt::print(stderr, "\r\033[K{} [{}{}] {:3.0f} % {}", stage, std::string(filled, '#'), std::string(kWidth - filled, ' '),
               100 * share, left);
    std::fflush(stderr);
  }

 private:
  static constexpr int kWidth = 30;

  const bool on_terminal_ = ::isatty(STDERR_FILENO) != 0;
  std::string stage_;
  std::size_t done_ = 0;
  Clock::time_point start_ = Clock::now(), drawn_;
};

}  // namespace

ProgressCallback terminal_progress() {
  return ProgressLine();
}

void clear_progress() {
  if (!line_drawn) return;
  fmt::print(stderr, "\r\033[K");
  std::fflush(stderr);
  line_drawn = false;
}

void install_interrupt_handler() {
  std::signal(SIGINT, on_interrupt);
}

void install_warning_handler() {
  set_warning_handler([](std::string_view message) {
    clear_progress();
    fmt::print(stderr, "veloxquant: warning: {}\n", message);
  });
}

}  // namespace veloxquant::cli
