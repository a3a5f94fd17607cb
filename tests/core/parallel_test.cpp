#include "veloxquant/core/parallel.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

namespace veloxquant {
namespace {

class Parallel : public ::testing::TestWithParam<int> {
 protected:
  void SetUp() override { set_num_threads(GetParam()); }
  void TearDown() override { set_num_threads(before_); }

 private:
  int before_ = num_threads();
};

std::vector<std::pair<std::size_t, std::size_t>> ranges_of(std::size_t count, std::size_t grain) {
  std::mutex mutex;
  std::vector<std::pair<std::size_t, std::size_t>> ranges;
  parallel_for(count, grain, [&](std::size_t begin, std::size_t end) {
    std::lock_guard lock(mutex);
    ranges.emplace_back(begin, end);
  });
  std::sort(ranges.begin(), ranges.end());
  return ranges;
}

TEST_P(Parallel, RangesDependOnCountAndGrainAlone) {
  for (const std::size_t count : {0, 1, 2, 7, 100, 1000})
    for (const std::size_t grain : {0, 1, 3, 7, 100, 5000}) {
      std::vector<std::pair<std::size_t, std::size_t>> expected;
      const std::size_t step = std::max<std::size_t>(grain, 1);
      for (std::size_t begin = 0; begin < count; begin += step) expected.emplace_back(begin, std::min(begin + step, count));
      EXPECT_EQ(ranges_of(count, grain), expected) << count << " by " << grain;
    }
}

TEST_P(Parallel, RethrowsAndWorksOnAfterwards) {
  for (int round = 0; round < 20; ++round) {
    EXPECT_THROW(parallel_for(1000, 1,
                              [](std::size_t begin, std::size_t) {
                                if (begin == 500) throw std::invalid_argument("500");
                              }),
                 std::invalid_argument);
    EXPECT_EQ(ranges_of(100, 10).size(), 10u);
  }
}

TEST_P(Parallel, NestedCallsRunOnTheirThread) {
  std::atomic<int> calls = 0;
  parallel_for(20, 1, [&](std::size_t, std::size_t) { parallel_for(30, 1, [&](std::size_t, std::size_t) { ++calls; }); });
  EXPECT_EQ(calls, 600);
}

TEST_P(Parallel, ManySmallJobs) {
  std::atomic<std::size_t> sum = 0;
  for (int job = 0; job < 2000; ++job) parallel_for(8, 1, [&](std::size_t begin, std::size_t end) { sum += end - begin; });
  EXPECT_EQ(sum, 16'000u);
}

// Some while threads still look out for a job, others when they sleep.
TEST_P(Parallel, JobsAfterPauses) {
  for (int job = 0; job < 60; ++job) {
    std::this_thread::sleep_for(std::chrono::microseconds(20 * (job % 8)));
    EXPECT_EQ(ranges_of(64, 7).size(), 10u);
  }
}

// A thread that still is in its range is waited for, however long that takes.
TEST_P(Parallel, WaitsForSlowRanges) {
  std::vector<int> done(6, 0);
  parallel_for(done.size(), 1, [&](std::size_t begin, std::size_t) {
    std::this_thread::sleep_for(std::chrono::milliseconds(begin % 3));
    done[begin] = 1;
  });
  EXPECT_EQ(done, std::vector<int>(6, 1));
}

INSTANTIATE_TEST_SUITE_P(Threads, Parallel, ::testing::Values(1, 2, 3, 8));

TEST(NumThreads, RefusesWhatCannotBe) {
  const int before = num_threads();
  for (const int threads : {-1, 0, 1025}) EXPECT_THROW(set_num_threads(threads), std::invalid_argument);
  EXPECT_EQ(num_threads(), before);
  EXPECT_GE(before, 1);
}

}  // namespace
}  // namespace veloxquant
