#include "veloxquant/calibrate/activations.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <stdexcept>

#include "mlx/ops.h"
#include "mlx/random.h"
#include "mlx/transforms.h"

namespace veloxquant {
namespace {

mx::array some(std::uint64_t seed) {
  return mx::random::normal({3, 5, 7}, mx::float32, mx::random::key(seed));
}

bool same(const mx::array& a, const mx::array& b) {
  return mx::array_equal(a, b).item<bool>();
}

// Limits below, between and above what five arrays take: all in the file, some, none.
TEST(Activations, GiveBackWhatWasPutIn) {
  const std::size_t bytes = some(0).nbytes();
  for (const std::size_t limit : {std::size_t{0}, 2 * bytes, 100 * bytes}) {
    Activations activations(limit);
    for (std::uint64_t i = 0; i < 5; ++i) activations.add(some(i));
    ASSERT_EQ(activations.size(), 5u);
    for (std::uint64_t i = 0; i < 5; ++i) {
      EXPECT_TRUE(same(activations.get(i), some(i))) << "limit " << limit << ", array " << i;
      for (int row = 0; row < 3; ++row)
        EXPECT_TRUE(same(activations.get_row(i, row), mx::slice(some(i), {row, 0, 0}, {row + 1, 5, 7}))) << "row " << row;
    }
    activations.set(1, some(11));
    activations.set(4, mx::transpose(some(12), {0, 1, 2}));
    EXPECT_TRUE(same(activations.get(1), some(11)));
    EXPECT_TRUE(same(activations.get(4), some(12)));
    EXPECT_TRUE(same(activations.get(3), some(3)));
  }
}

TEST(Activations, KeepTheOrderOfTransposedArrays) {
  Activations activations(0);
  const auto transposed = mx::transpose(some(1), {2, 0, 1});
  activations.add(transposed);
  EXPECT_TRUE(same(activations.get(0), transposed));
}

TEST(Activations, SayWhereTheDiskFails) {
  const char* before = std::getenv("TMPDIR");
  const std::string kept = before ? before : "";
  ::setenv("TMPDIR", "/proc", 1);  // a folder where nobody makes files
  Activations activations(0);
  try {
    activations.add(some(1));
    ADD_FAILURE() << "expected an exception";
  } catch (const std::runtime_error& error) {
    EXPECT_NE(std::string(error.what()).find("/proc"), std::string::npos) << error.what();
  }
  if (before) {
    ::setenv("TMPDIR", kept.c_str(), 1);
  } else {
    ::unsetenv("TMPDIR");
  }
}

}  // namespace
}  // namespace veloxquant
