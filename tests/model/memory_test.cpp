#include "veloxquant/model/memory.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <new>
#include <stdexcept>
#include <utility>

#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "veloxquant/model/cpu_operation.h"

namespace veloxquant {
namespace {

using ::testing::ContainsRegex;

TEST(OutOfMemory, IsToldFromOtherErrors) {
  const auto told = ContainsRegex("out of memory: arrays took .* at most, of .*iB that they may take");
  EXPECT_THAT(out_of_memory(std::bad_alloc()).value_or(""), told);
  for (const char* words : {"cudaMallocAsync(&data, size, stream) failed: out of memory", "[malloc] Unable to allocate 99 bytes.",
                            "cublasLtCreate(&handle) failed with code: CUBLAS_STATUS_ALLOC_FAILED"})
    EXPECT_THAT(out_of_memory(std::runtime_error(words)).value_or(""), told) << words;
  EXPECT_EQ(out_of_memory(std::runtime_error("[read] memory.txt: No such file or directory")), std::nullopt);
}

TEST(OutOfMemory, ComesOutOfAnOperationOfOursAndLeavesTheNextOnesAlone) {
  const auto filled = [](mx::Shape shape) {
    return cpu_operation("Fill", {mx::array(1.0f)}, {std::move(shape)},
                         [](const auto&, auto& out) { std::fill_n(out[0].template data<float>(), out[0].size(), 1.0f); })[0];
  };
  EXPECT_THROW(mx::eval(filled({1 << 20, 1 << 20, 16})), std::bad_alloc);  // 2^46 bytes
  const auto small = filled({3});
  mx::eval(small);
  EXPECT_EQ(small.data<float>()[2], 1.0f);
}

}  // namespace
}  // namespace veloxquant
