// Progress of long work, and how it is interrupted.
#pragma once

#include <cstddef>
#include <functional>
#include <stdexcept>
#include <string_view>

namespace veloxquant {

/// Receives "stage: done of total"; called from the thread that started the work, at least once a second where the work allows.
/// It stops the work by throwing (Interrupted, say): long functions keep no half-finished state and write no file before the end.
using ProgressCallback = std::function<void(std::string_view stage, std::size_t done, std::size_t total)>;

/// What a ProgressCallback throws when the user wants to stop.
class Interrupted : public std::runtime_error {
 public:
  Interrupted() : std::runtime_error("interrupted") {}
};

/// One stage of long work: counts steps and reports them.  An empty call-back is fine.
class ProgressStage {
 public:
  ProgressStage(const ProgressCallback& callback, std::string_view stage, std::size_t total)
      : callback_(callback), stage_(stage), total_(total) {
    report();
  }

  void advance(std::size_t steps = 1) {
    done_ += steps;
    report();
  }

 private:
  void report() const {
    if (callback_) callback_(stage_, done_, total_);
  }

  const ProgressCallback& callback_;
  std::string_view stage_;
  std::size_t done_ = 0, total_;
};

}  // namespace veloxquant
