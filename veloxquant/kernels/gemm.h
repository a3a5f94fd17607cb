// Float32 matrix products on our own threads.
#pragma once

#include <cstdint>
#include <string>

namespace veloxquant {

/// C [m, n] = alpha · op(A) · op(B) + beta · C, row-major with leading dimensions lda, ldb, ldc; op transposes where asked: A is
/// [m, k], or [k, m] if transposed.  Runs on the calling thread alone, so that parallel loops can call it.
void gemm(bool transpose_a, bool transpose_b, int m, int n, int k, float alpha, const float* a, int lda, const float* b, int ldb,
          float beta, float* c, int ldc);

/// Keeps BLAS and LAPACK to the calling thread from now on, as gemm() does: results then do not depend on the machine's threads.
void keep_blas_on_one_thread();

/// How often this process has called the cblas_sgemm that this library defines: MLX does, unless it was bound to another one.
std::uint64_t gemm_calls();

/// Which BLAS does the work, such as "OpenBLAS 0.3.21 (Haswell)".
std::string blas_description();

}  // namespace veloxquant
