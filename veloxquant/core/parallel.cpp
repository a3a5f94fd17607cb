#include "veloxquant/core/parallel.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "veloxquant/core/error.h"

namespace veloxquant {
namespace {

thread_local bool inside_parallel_for = false;

int processors() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1u, std::thread::hardware_concurrency());
}

// Threads wait for a job, take ranges of it from a shared counter until none is left, and wait again.
class Pool {
 public:
  explicit Pool(int threads) {
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
    {
      std::lock_guard lock(mutex_);
      count_ = count;
      grain_ = grain;
      body_ = &body;
      next_ = 0;
      error_ = nullptr;
      busy_ = workers_.size();
      ++job_;
    }
    wake_.notify_all();
    take_ranges();
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
    body_ = nullptr;
    if (error_) std::rethrow_exception(error_);
  }

 private:
  void work() {
    std::size_t seen = 0;
    for (;;) {
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return stopping_ || job_ != seen; });
        if (stopping_) return;
        seen = job_;
      }
      take_ranges();
      std::lock_guard lock(mutex_);
      if (--busy_ == 0) done_.notify_all();
    }
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
  std::mutex job_mutex_, mutex_;
  std::condition_variable wake_, done_;
  const std::function<void(std::size_t, std::size_t)>* body_ = nullptr;
  std::size_t count_ = 0, grain_ = 1, job_ = 0, busy_ = 0;
  std::atomic<std::size_t> next_ = 0;
  std::exception_ptr error_;
  bool stopping_ = false;
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
