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

TEST(RmsNorm, BackwardEqualsReferenceAtOddSizes) {
  testing::for_each_target([] {
    for (const std::size_t dim : {1, 2, 3, 7, 63, 64, 65, 129, 1000}) {
      SCOPED_TRACE(dim);
      const auto x = normal_values(5 * dim, dim), weight = normal_values(dim, dim + 1), grad_out = normal_values(5 * dim, dim + 2);
      std::vector<float> actual(x.size()), expected(x.size());
      rms_norm_backward(x.data(), weight.data(), grad_out.data(), actual.data(), 5, dim, 1e-5f);
      reference::rms_norm_backward(x.data(), weight.data(), grad_out.data(), expected.data(), 5, dim, 1e-5f);
      testing::expect_near(actual, expected, 2e-6 / (dim == 1 ? 1e-1 : 1), 2e-6);
    }
  });
}

TEST(RmsNorm, GradientIsTheSlope) {
  auto x = normal_values(9, 1);
  const auto weight = normal_values(9, 2), grad_out = normal_values(9, 3);
  std::vector<float> gradient(9);
  rms_norm_backward(x.data(), weight.data(), grad_out.data(), gradient.data(), 1, 9, 1e-3f);
  const auto loss = [&] {
    const auto out = expected(x, weight, 1e-3f);
    double sum = 0;
    for (std::size_t i = 0; i < 9; ++i) sum += static_cast<double>(out[i]) * grad_out[i];
    return sum;
  };
  for (std::size_t i = 0; i < 9; ++i) {
    const float before = x[i], step = 1e-2f;
    x[i] = before + step;
    const double above = loss();
    x[i] = before - step;
    const double below = loss();
    x[i] = before;
    EXPECT_NEAR(gradient[i], (above - below) / (2 * step), 1e-3) << "at " << i;
  }
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
