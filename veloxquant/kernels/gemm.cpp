// The program's own cblas_sgemm stands before every library's: MLX's matrix products come through it too.  OpenBLAS with threads of
// its own beside our pool costs a factor of three, since both fight over the cores; so OpenBLAS runs single-threaded here, on
// pieces of the product that our pool shares out.  The pieces depend on the shape alone, and so does the result.
#include "veloxquant/kernels/gemm.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "veloxquant/core/parallel.h"
#include "veloxquant/kernels/openblas.h"

namespace veloxquant {
namespace {

// Pieces of C that threads share out: some rows by some columns.
struct Pieces {
  int rows, columns;
};

// At most eight, of at least 64 rows or columns.  OpenBLAS copies A's rows and B's columns into an order of its own for each piece,
// so that few pieces that are as square as the whole copy least: for 1024 by 1024 four, where eight strips cost a fifth of
// the product (AVX-512), and eight from 1448 by 1448 on.
Pieces pieces_of(int m, int n) {
  constexpr int kMost = 8, kLeast = 64;
  constexpr std::int64_t kLarge = 512 * 512;
  const std::int64_t size = std::int64_t{m} * n;
  int count = kMost;
  while (count > 1 && std::max(m, n) < count * kLeast) count /= 2;
  if (size >= 4 * kLarge && size < kMost * kLarge) count = std::min(count, 4);
  const auto copied = [&](int strips) { return std::int64_t{n} * strips + std::int64_t{m} * (count / strips); };
  int strips = 1;
  for (int more = 2; more <= count; more *= 2)
    if (copied(more) < copied(strips)) strips = more;
  const auto piece = [](int whole, int parts) {
    constexpr int kMultiple = 16;
    return std::max(kMultiple, ((whole + parts - 1) / parts + kMultiple - 1) / kMultiple * kMultiple);
  };
  return {piece(m, strips), piece(n, count / strips)};
}

}  // namespace

void keep_blas_on_one_thread() {
  static const bool single_threaded = (openblas::set_num_threads(1), true);
  (void)single_threaded;
}

void gemm(bool transpose_a, bool transpose_b, int m, int n, int k, float alpha, const float* a, int lda, const float* b, int ldb,
          float beta, float* c, int ldc) {
  keep_blas_on_one_thread();
  // Fortran sees row-major arrays transposed: Cᵀ = op(B)ᵀ · op(A)ᵀ.
  const char first = transpose_b ? 'T' : 'N', second = transpose_a ? 'T' : 'N';
  if (m == 1 && k > 0) {  // one token: the matrix is read once, and copying it into sgemm's order takes 2 to 5 times as long
    const int rows = transpose_b ? k : n, columns = transpose_b ? n : k;
    openblas::sgemv(first, rows, columns, alpha, b, ldb, a, transpose_a ? lda : 1, beta, c, 1);
    return;
  }
  openblas::sgemm(first, second, n, m, k, alpha, b, ldb, a, lda, beta, c, ldc);
}

std::string blas_description() {
  return fmt::format("{} for {}", openblas::config(), openblas::core());
}

namespace {

void parallel_gemm(bool transpose_a, bool transpose_b, int m, int n, int k, float alpha, const float* a, int lda, const float* b,
                   int ldb, float beta, float* c, int ldc) {
  const auto [rows, columns] = pieces_of(m, n);
  const std::size_t across = static_cast<std::size_t>((n + columns - 1) / columns),
                    down = static_cast<std::size_t>((m + rows - 1) / rows);
  parallel_for(down * across, 1, [&](std::size_t piece, std::size_t) {
    const std::size_t row = piece / across * static_cast<std::size_t>(rows),
                      column = piece % across * static_cast<std::size_t>(columns);
    gemm(transpose_a, transpose_b, std::min(rows, m - static_cast<int>(row)), std::min(columns, n - static_cast<int>(column)), k,
         alpha, transpose_a ? a + row : a + row * static_cast<std::size_t>(lda), lda,
         transpose_b ? b + column * static_cast<std::size_t>(ldb) : b + column, ldb, beta,
         c + row * static_cast<std::size_t>(ldc) + column, ldc);
  });
}

std::atomic<std::uint64_t> calls = 0;

}  // namespace

std::uint64_t gemm_calls() {
  return calls;
}

}  // namespace veloxquant

// The standard's values: order 101 is row-major, 102 column-major; transpose 111 is no, 112 yes (113, conjugate, is the same here).
extern "C" void cblas_sgemm(int order, int transpose_a, int transpose_b, int m, int n, int k, float alpha, const float* a, int lda,
                            const float* b, int ldb, float beta, float* c, int ldc) {
  constexpr int kColumnMajor = 102, kNoTranspose = 111;
  veloxquant::calls.fetch_add(1, std::memory_order_relaxed);
  const bool ta = transpose_a != kNoTranspose, tb = transpose_b != kNoTranspose;
  if (order == kColumnMajor) {
    veloxquant::parallel_gemm(tb, ta, n, m, k, alpha, b, ldb, a, lda, beta, c, ldc);
  } else {
    veloxquant::parallel_gemm(ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
  }
}
