#include "veloxquant/cli/terminal.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>

#include "veloxquant/core/warning.h"
#include "veloxquant/plan/layer_map.h"

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

// Terminal columns of UTF-8 text without wide characters.
std::size_t columns(const std::string& text) {
  return static_cast<std::size_t>(std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xC0) != 0x80; }));
}

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

std::string table(const std::vector<std::vector<std::string>>& rows) {
  std::vector<std::size_t> widths;
  for (const auto& row : rows) {
    widths.resize(std::max(widths.size(), row.size()));
    for (std::size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], columns(row[i]));
  }
  std::string text;
  for (const auto& row : rows) {
    std::string line;
    for (std::size_t i = 0; i < row.size(); ++i) {
      const std::string padding(widths[i] - columns(row[i]), ' ');
      line += i == 0 ? row[i] + padding : "  " + padding + row[i];
    }
    line.erase(line.find_last_not_of(' ') + 1);
    text += line + "\n";
  }
  return text;
}

std::string unit_name(int layer, Side side, std::optional<int> head) {
  return fmt::format("{} {}{}", layer_name(layer), to_string(side), head ? fmt::format(" head {}", *head) : "");
}

std::string bytes_text(std::size_t bytes) {
  if (bytes < 1024) return fmt::format("{} bytes", bytes);
  double value = static_cast<double>(bytes);
  const char* unit = "";
  for (const char* next : {"KiB", "MiB", "GiB", "TiB"}) {
    if (value < 1024) break;
    value /= 1024;
    unit = next;
  }
  return fmt::format("{:.1f} {}", value, unit);
}

}  // namespace veloxquant::cli
