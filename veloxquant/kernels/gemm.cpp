// The program's own cblas_sgemm stands before every library's: MLX's matrix products come through it too.  OpenBLAS with threads of
// its own beside our pool costs a factor of three, since both fight over the cores; so OpenBLAS runs single-threaded here, on
// pieces of the product that our pool shares out.  The pieces depend on the shape alone, and so does the result.
#include "veloxquant/kernels/gemm.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>

#include "veloxquant/core/parallel.h"
#include "veloxquant/kernels/openblas.h"

namespace veloxquant {
namespace {

constexpr int kPieces = 8;
constexpr int kSmallestPiece = 64, kPieceMultiple = 16;

// OpenBLAS copies the other matrix into an order of its own for each piece: with 128 rows a piece that costs 8 % of a product of
// 1024 rows, with 256 it costs 3 %.  Where there are at least four, they have that many.
constexpr int kLargePiece = 256;

int piece_of(int size) {
  const int even = (size + kPieces - 1) / kPieces, least = size >= 4 * kLargePiece ? kLargePiece : kSmallestPiece;
  return std::max(least, (even + kPieceMultiple - 1) / kPieceMultiple * kPieceMultiple);
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

// Rows of C, or its columns where there are more, in pieces on all threads.
void parallel_gemm(bool transpose_a, bool transpose_b, int m, int n, int k, float alpha, const float* a, int lda, const float* b,
                   int ldb, float beta, float* c, int ldc) {
  if (m >= n) {
    parallel_for(static_cast<std::size_t>(m), static_cast<std::size_t>(piece_of(m)), [&](std::size_t begin, std::size_t end) {
      const float* rows = transpose_a ? a + begin : a + begin * static_cast<std::size_t>(lda);
      gemm(transpose_a, transpose_b, static_cast<int>(end - begin), n, k, alpha, rows, lda, b, ldb, beta,
           c + begin * static_cast<std::size_t>(ldc), ldc);
    });
  } else {
    parallel_for(static_cast<std::size_t>(n), static_cast<std::size_t>(piece_of(n)), [&](std::size_t begin, std::size_t end) {
      const float* columns = transpose_b ? b + begin * static_cast<std::size_t>(ldb) : b + begin;
      gemm(transpose_a, transpose_b, m, static_cast<int>(end - begin), k, alpha, a, lda, columns, ldb, beta, c + begin, ldc);
    });
  }
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
