#include "veloxquant/kernels/gemm.h"

#include <limits>
#include <string>

#include "tests/kernels/every_target.h"

extern "C" void cblas_sgemm(int order, int transpose_a, int transpose_b, int m, int n, int k, float alpha, const float* a, int lda,
                            const float* b, int ldb, float beta, float* c, int ldc);

namespace veloxquant {
namespace {

using testing::normal_values;

constexpr int kRowMajor = 101, kColumnMajor = 102, kNoTranspose = 111, kTranspose = 112;

// A product whose arrays are wider than their contents by `padding`, which nobody may write to.
struct Product {
  bool transpose_a, transpose_b;
  int m, n, k;
  float alpha = 1.0f, beta = 0.0f;
  int padding = 0;

  int lda() const { return (transpose_a ? m : k) + padding; }
  int ldb() const { return (transpose_b ? k : n) + padding; }
  int ldc() const { return n + padding; }
  std::vector<float> a() const { return normal_values(static_cast<std::size_t>((transpose_a ? k : m) * lda()), 1); }
  std::vector<float> b() const { return normal_values(static_cast<std::size_t>((transpose_b ? n : k) * ldb()), 2); }
  std::vector<float> c() const { return normal_values(static_cast<std::size_t>(m * ldc()), 3); }

  std::vector<float> expected() const {
    const auto x = a(), y = b();
    auto out = c();
    for (int i = 0; i < m; ++i) {
      for (int j = 0; j < n; ++j) {
        double sum = 0;
        for (int l = 0; l < k; ++l)
          sum +=
              static_cast<double>(x[transpose_a ? l * lda() + i : i * lda() + l]) * y[transpose_b ? j * ldb() + l : l * ldb() + j];
        float& value = out[i * ldc() + j];
        value = static_cast<float>(alpha * sum + (beta == 0 ? 0.0 : static_cast<double>(beta) * value));
      }
    }
    return out;
  }

  std::vector<float> by_gemm() const {
    const auto x = a(), y = b();
    auto out = c();
    gemm(transpose_a, transpose_b, m, n, k, alpha, x.data(), lda(), y.data(), ldb(), beta, out.data(), ldc());
    return out;
  }

  std::vector<float> by_cblas(int order) const {
    const auto x = a(), y = b();
    auto out = c();
    const int ta = transpose_a ? kTranspose : kNoTranspose, tb = transpose_b ? kTranspose : kNoTranspose;
    if (order == kRowMajor) {
      cblas_sgemm(order, ta, tb, m, n, k, alpha, x.data(), lda(), y.data(), ldb(), beta, out.data(), ldc());
    } else {  // the same memory, read by columns, is the transposed product
      cblas_sgemm(order, tb, ta, n, m, k, alpha, y.data(), ldb(), x.data(), lda(), beta, out.data(), ldc());
    }
    return out;
  }

  // Rounding of a sum of k products of standard normals, with a factor to spare for the order of addition.
  double tolerance() const { return 4e-7 * (k + 4) * std::abs(alpha) + 1e-6; }
};

void expect_all_equal_reference(const Product& product) {
  const auto expected = product.expected();
  testing::expect_near(product.by_gemm(), expected, product.tolerance());
  testing::expect_near(product.by_cblas(kRowMajor), expected, product.tolerance());
  testing::expect_near(product.by_cblas(kColumnMajor), expected, product.tolerance());
}

TEST(Gemm, EveryTransposeAtOddSizes) {
  for (const bool ta : {false, true})
    for (const bool tb : {false, true})
      for (const int m : {1, 3, 65, 130})
        for (const int n : {1, 2, 63, 257})
          for (const int k : {1, 7, 64}) {
            SCOPED_TRACE(::testing::Message() << ta << tb << " " << m << "x" << n << "x" << k);
            expect_all_equal_reference({.transpose_a = ta, .transpose_b = tb, .m = m, .n = n, .k = k, .padding = 5});
          }
}

TEST(Gemm, AlphaAndBeta) {
  for (const float beta : {0.0f, 1.0f, -0.5f})
    expect_all_equal_reference(
        {.transpose_a = false, .transpose_b = true, .m = 131, .n = 70, .k = 33, .alpha = -2.5f, .beta = beta});
}

// With beta 0 the result's memory may hold anything.
TEST(Gemm, BetaZeroDoesNotRead) {
  for (const int m : {1, 2, 70}) {
    const std::vector<float> a(static_cast<std::size_t>(m) * 3, 1.0f), b(5 * 3, 2.0f);
    std::vector<float> c(static_cast<std::size_t>(m) * 5, std::numeric_limits<float>::quiet_NaN());
    cblas_sgemm(kRowMajor, kNoTranspose, kTranspose, m, 5, 3, 1.0f, a.data(), 3, b.data(), 3, 0.0f, c.data(), 5);
    EXPECT_EQ(c, std::vector<float>(c.size(), 6.0f));
  }
}

// Pieces with inner borders and shorter last ones, along rows, along columns, and along both.
TEST(Gemm, SplitInPieces) {
  for (const bool ta : {false, true})
    for (const bool tb : {false, true}) {
      expect_all_equal_reference({.transpose_a = ta, .transpose_b = tb, .m = 1033, .n = 17, .k = 9, .padding = 3});
      expect_all_equal_reference({.transpose_a = ta, .transpose_b = tb, .m = 17, .n = 1033, .k = 9, .padding = 3});
      expect_all_equal_reference({.transpose_a = ta, .transpose_b = tb, .m = 500, .n = 530, .k = 9, .padding = 3});
      expect_all_equal_reference({.transpose_a = ta, .transpose_b = tb, .m = 1040, .n = 1030, .k = 3, .padding = 3});
    }
}

TEST(Gemm, EmptyProducts) {
  EXPECT_TRUE((Product{.transpose_a = false, .transpose_b = false, .m = 0, .n = 5, .k = 3}.by_cblas(kRowMajor).empty()));
  const Product nothing_to_add{.transpose_a = false, .transpose_b = false, .m = 4, .n = 5, .k = 0, .padding = 1};
  EXPECT_EQ(nothing_to_add.by_cblas(kRowMajor), nothing_to_add.expected());
}

TEST(Gemm, SameBitsOnAnyThreads) {
  testing::expect_same_on_any_threads(
      [] { return Product{.transpose_a = false, .transpose_b = true, .m = 700, .n = 190, .k = 129}.by_cblas(kRowMajor); });
  testing::expect_same_on_any_threads(
      [] { return Product{.transpose_a = true, .transpose_b = false, .m = 3, .n = 900, .k = 65}.by_cblas(kColumnMajor); });
}

}  // namespace
}  // namespace veloxquant
