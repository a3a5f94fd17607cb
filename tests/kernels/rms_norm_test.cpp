#include "veloxquant/kernels/rms_norm.h"

#include <cmath>

#include "tests/kernels/every_target.h"

namespace veloxquant {
namespace {

using testing::normal_values;

std::vector<float> normed(const std::vector<float>& x, const std::vector<float>& weight, float eps) {
  std::vector<float> out(x.size());
  rms_norm(x.data(), weight.data(), out.data(), x.size() / weight.size(), weight.size(), eps);
  return out;
}

std::vector<float> expected(const std::vector<float>& x, const std::vector<float>& weight, float eps) {
  std::vector<float> out(x.size());
  reference::rms_norm(x.data(), weight.data(), out.data(), x.size() / weight.size(), weight.size(), eps);
  return out;
}

TEST(RmsNorm, EqualsReferenceAtOddSizes) {
  testing::for_each_target([] {
    for (const std::size_t dim : {1, 2, 3, 7, 63, 64, 65, 129, 1000}) {
      for (const std::size_t rows : {1, 2, 5}) {
        SCOPED_TRACE(dim);
        const auto x = normal_values(rows * dim, dim), weight = normal_values(dim, dim + 1);
        testing::expect_near(normed(x, weight, 1e-5f), expected(x, weight, 1e-5f), 1e-7, 2e-6);
      }
    }
  });
}

TEST(RmsNorm, InPlace) {
  auto x = normal_values(3 * 65, 1);
  const auto weight = normal_values(65, 2), apart = normed(x, weight, 1e-6f);
  rms_norm(x.data(), weight.data(), x.data(), 3, 65, 1e-6f);
  EXPECT_EQ(x, apart);
}

TEST(RmsNorm, ExtremeRows) {
  testing::for_each_target([] {
    const std::vector<float> ones(9, 1.0f);
    EXPECT_EQ(normed(std::vector<float>(9, 0.0f), ones, 1e-6f), std::vector<float>(9, 0.0f));
    testing::expect_near(normed(std::vector<float>(9, 1e15f), ones, 1e-6f), ones, 1e-6);
    testing::expect_near(normed(std::vector<float>(9, -1e-15f), ones, 1e-6f), std::vector<float>(9, -1e-12f),
                         1e-17);  // eps decides
  });
}

TEST(RmsNorm, SameBitsOnAnyThreads) {
  const auto x = normal_values(700 * 257, 5), weight = normal_values(257, 6);
  testing::expect_same_on_any_threads([&] { return normed(x, weight, 1e-5f); });
}

}  // namespace
}  // namespace veloxquant
