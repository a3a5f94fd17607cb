#include "veloxquant/core/parallel.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <fstream>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "veloxquant/core/error.h"

namespace veloxquant {
namespace {

thread_local bool inside_parallel_for = false;

// Processors that the group of processes has time for (cpu.max of cgroup v2, "microseconds of each period" or "max"), rounded up.
int processors_of_group(int most) {
  std::ifstream groups("/proc/self/cgroup");
  std::string line;
  while (std::getline(groups, line) && !line.starts_with("0::/")) {
  }
  if (!line.starts_with("0::/")) return most;
  std::filesystem::path group = "/sys/fs/cgroup" + line.substr(3);
  for (;; group = group.parent_path()) {
    std::ifstream limit(group / "cpu.max");
    double quota = 0, period = 0;
    if (limit >> quota >> period && quota > 0 && period > 0)
      most = std::clamp(static_cast<int>(std::ceil(quota / period)), 1, most);
    if (group == "/sys/fs/cgroup" || !group.has_relative_path()) return most;
  }
}

int processors() {
  static const int count = [] {
    cpu_set_t set;
    const bool known = sched_getaffinity(0, sizeof(set), &set) == 0;
    return processors_of_group(std::max(1, known ? CPU_COUNT(&set) : static_cast<int>(std::thread::hardware_concurrency())));
  }();
  return count;
}

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits for `done` at most so long without giving the processor away; returns whether it came.
template <class Done>
bool spin(std::chrono::nanoseconds longest, Done done) {
  constexpr int kPausesOfLook = 8;
  if (done()) return true;
  if (longest.count() == 0) return false;
  for (const auto end = std::chrono::steady_clock::now() + longest; std::chrono::steady_clock::now() < end;) {
    for (int i = 0; i < kPausesOfLook; ++i) {
      pause();
      if (done()) return true;
    }
  }
  return false;
}

// Threads wait for a job, take ranges of it from a shared counter until none is left, and wait again.  A job is over when its
// ranges are: threads that come later are not waited for, so that one which gets no processor holds nobody up.
//
// Jobs follow each other within microseconds while a layer is computed, where putting a thread to sleep and waking it costs about
// as much as the job: threads look for the next job for kSpin before they sleep.  Not where there are more of them than processors.
class Pool {
 public:
  explicit Pool(int threads) : spin_(threads <= processors() ? kSpin : std::chrono::nanoseconds(0)) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
  }

  ~Pool() {
    {
      std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  void run(std::size_t count, std::size_t grain, const std::function<void(std::size_t, std::size_t)>& body) {
    std::lock_guard one_job_at_a_time(job_mutex_);
    count_ = count;
    grain_ = grain;
    body_ = &body;
    next_ = 0;
    error_ = nullptr;
    state_ = (state_ & ~(kOpen | kInside)) + kNextJob + kOpen;
    if (sleeping_ > 0) wake((count + grain - 1) / grain - 1);
    take_ranges();
    state_ &= ~kOpen;
    const auto left = [this] { return (state_ & kInside) == 0; };
    if (!spin(spin_, left)) {
      std::unique_lock lock(mutex_);
      waiting_ = true;
      done_.wait(lock, left);
      waiting_ = false;
    }
    if (error_) std::rethrow_exception(error_);
  }

 private:
  static constexpr std::chrono::microseconds kSpin{50};

  // state_: how many threads are inside the job, whether others may enter, and its number.
  static constexpr std::uint64_t kInside = (std::uint64_t{1} << 31) - 1, kOpen = std::uint64_t{1} << 31,
                                 kNextJob = std::uint64_t{1} << 32;

  // As many threads as there is work for.  Who goes to sleep counts itself before it looks at state_ once more, and state_ was
  // changed before the count was read: one of both sees the other.
  void wake(std::size_t threads) {
    { std::lock_guard lock(mutex_); }
    if (threads >= workers_.size()) return wake_.notify_all();
    for (std::size_t i = 0; i < threads; ++i) wake_.notify_one();
  }

  void work() {
    std::uint64_t seen = 0;
    const auto comes = [&] {
      const std::uint64_t state = state_;
      return stopping_ || ((state & kOpen) != 0 && state / kNextJob != seen);
    };
    for (;;) {
      if (!spin(spin_, comes)) {
        std::unique_lock lock(mutex_);
        ++sleeping_;
        wake_.wait(lock, comes);
        --sleeping_;
      }
      if (stopping_) return;
      std::uint64_t state = state_;
      while ((state & kOpen) != 0 && state / kNextJob != seen) {
        if (!state_.compare_exchange_weak(state, state + 1)) continue;
        seen = state / kNextJob;
        take_ranges();
        leave();
        break;
      }
    }
  }

  void leave() {
    if ((--state_ & (kOpen | kInside)) != 0 || !waiting_) return;
    std::lock_guard lock(mutex_);
    done_.notify_all();
  }

  void take_ranges() {
    inside_parallel_for = true;
    for (std::size_t begin; (begin = next_.fetch_add(grain_)) < count_;) {
      try {
        (*body_)(begin, std::min(begin + grain_, count_));
      } catch (...) {
        std::lock_guard lock(mutex_);
        if (!error_) error_ = std::current_exception();
        next_ = count_;
      }
    }
    inside_parallel_for = false;
  }

  std::vector<std::thread> workers_;
  const std::chrono::nanoseconds spin_;
  std::mutex job_mutex_, mutex_;
  std::condition_variable wake_, done_;
  // Of the job: written while no thread is inside.
  const std::function<void(std::size_t, std::size_t)>* body_ = nullptr;
  std::size_t count_ = 0, grain_ = 1;
  std::exception_ptr error_;
  // Each on a cache line of its own: threads that look for a job do not slow down those that take ranges.
  alignas(64) std::atomic<std::uint64_t> state_ = 0;
  alignas(64) std::atomic<std::size_t> next_ = 0;
  alignas(64) std::atomic<int> sleeping_ = 0;
  std::atomic<bool> waiting_ = false, stopping_ = false;
};

std::unique_ptr<Pool>& pool() {
  static auto instance = std::make_unique<Pool>(processors());
  return instance;
}

}  // namespace

int num_threads() {
  return pool()->threads();
}

void set_num_threads(int threads) {
  if (threads < 1 || threads > 1024) throw_invalid("set_num_threads", "expected 1 to 1024 threads, got {}", threads);
  pool() = std::make_unique<Pool>(threads);
}

void parallel_for(std::size_t count, std::size_t grain, const std::function<void(std::size_t, std::size_t)>& body) {
  grain = std::max<std::size_t>(grain, 1);
  if (inside_parallel_for || count <= grain || num_threads() == 1) {
    for (std::size_t begin = 0; begin < count; begin += grain) body(begin, std::min(begin + grain, count));
    return;
  }
  pool()->run(count, grain, body);
}

}  // namespace veloxquant
