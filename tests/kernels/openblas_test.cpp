#include "veloxquant/kernels/openblas.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <hwy/targets.h>

namespace veloxquant::openblas {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr std::int64_t kSse4 = HWY_SSE4, kAvx2 = kSse4 | HWY_AVX2, kAvx512 = kAvx2 | HWY_AVX3;
constexpr const char* kDynamic = "OpenBLAS 0.3.34 DYNAMIC_ARCH NO_AFFINITY Haswell MAX_THREADS=64";

TEST(OpenBlas, KernelsAsWideAsTheProcessorAreFine) {
  EXPECT_THAT(narrow_kernel("Prescott", kDynamic, kSse4, ""), IsEmpty());
  for (const char* core : {"Haswell", "Zen"}) EXPECT_THAT(narrow_kernel(core, kDynamic, kAvx2, ""), IsEmpty());
  for (const char* core : {"SkylakeX", "Cooperlake", "SapphireRapids"})  // what OpenBLAS chooses on Zen 4 and 5, too
    for (const std::int64_t targets : std::initializer_list<std::int64_t>{kAvx512, kAvx512 | HWY_AVX3_DL})
      EXPECT_THAT(narrow_kernel(core, kDynamic, targets, ""), IsEmpty());
  // Wider than what our kernels use: whoever made it so had a reason.
  EXPECT_THAT(narrow_kernel("SkylakeX", kDynamic, kAvx2, ""), IsEmpty());
}

TEST(OpenBlas, CoresThatAreNotKnownAreNotJudged) {
  for (const char* core : {"Unknown", "DiamondRapids", "Neoversen1", ""})
    EXPECT_THAT(narrow_kernel(core, kDynamic, kAvx512, ""), IsEmpty());
}

TEST(OpenBlas, NarrowKernelsAreNamedWithWhatHelps) {
  const auto prescott = narrow_kernel("Prescott", kDynamic, kAvx512, "");
  EXPECT_THAT(prescott, HasSubstr("with SSE (its kernel for Prescott) on a processor that has AVX-512"));
  EXPECT_THAT(prescott, HasSubstr("set OPENBLAS_CORETYPE=SkylakeX, or link a newer OpenBLAS"));
  EXPECT_THAT(narrow_kernel("Haswell", kDynamic, kAvx512, ""), HasSubstr("AVX2 (its kernel for Haswell)"));
  EXPECT_THAT(narrow_kernel("Excavator", kDynamic, kAvx2, ""), HasSubstr("set OPENBLAS_CORETYPE=Haswell"));
  EXPECT_THAT(narrow_kernel("Katmai", kDynamic, kAvx2, "Prescott"), HasSubstr("unset OPENBLAS_CORETYPE, which is Prescott"));
  EXPECT_THAT(narrow_kernel("Nehalem", "OpenBLAS 0.3.21 NO_AFFINITY", kAvx2, ""),
              HasSubstr("link an OpenBLAS with kernels for every"));
}

TEST(OpenBlas, SaysWhatItIs) {
  EXPECT_TRUE(config().starts_with("OpenBLAS ")) << config();
  EXPECT_FALSE(core().empty());
}

}  // namespace
}  // namespace veloxquant::openblas
