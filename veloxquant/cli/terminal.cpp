#include "veloxquant/cli/terminal.h"

#include <fmt/format.h>
#include <sys/time.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>

#include "veloxquant/core/warning.h"

namespace veloxquant::cli {
namespace {

using Clock = std::chrono::steady_clock;

std::atomic<bool> interrupted = false, line_drawn = false, ends_soon = false;

extern "C" void on_interrupt(int) {
  interrupted = true;
  std::signal(SIGINT, SIG_DFL);
  if (!ends_soon) return;
  struct itimerval half_a_second = {{0, 0}, {0, 500'000}};
  ::setitimer(ITIMER_REAL, &half_a_second, nullptr);
}

// In the middle of anything: only what a signal handler may call.
extern "C" void on_patience_lost(int) {
  constexpr std::string_view kWipe = "\r\033[K", kMessage = "veloxquant: interrupted\n";
  if (line_drawn) (void)!::write(STDERR_FILENO, kWipe.data(), kWipe.size());
  (void)!::write(STDERR_FILENO, kMessage.data(), kMessage.size());
  ::_exit(kInterruptedStatus);
}

std::string time_text(double seconds) {
  const auto whole = static_cast<long>(seconds + 0.5);
  return whole < 60 ? fmt::format("{} s", whole) : fmt::format("{} min {:02} s", whole / 60, whole % 60);
}

// Draws at most ten times a second, and estimates the time left of the stage from its pace so far.
class ProgressLine {
 public:
  void operator()(std::string_view stage, std::size_t done, std::size_t total) {
    check_interrupt();
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

void check_interrupt() {
  if (!interrupted) return;
  std::signal(SIGALRM, SIG_IGN);
  throw Interrupted();
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

void end_soon_at_interrupt() {
  std::signal(SIGALRM, on_patience_lost);
  ends_soon = true;
}

void install_warning_handler() {
  set_warning_handler([](std::string_view message) {
    clear_progress();
    fmt::print(stderr, "veloxquant: warning: {}\n", message);
  });
}

}  // namespace veloxquant::cli
