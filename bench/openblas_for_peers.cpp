// OpenBLAS's product under the name that MLX calls, where OpenBLAS itself gives it a prefix: peers.py loads this before mlx_lm.
#define JOINED(prefix, name) prefix##name
#define NAME(prefix, name) JOINED(prefix, name)
#define OPENBLAS_SGEMM NAME(VELOXQUANT_OPENBLAS_PREFIX, cblas_sgemm)

extern "C" {
void OPENBLAS_SGEMM(int order, int transpose_a, int transpose_b, int m, int n, int k, float alpha, const float* a, int lda,
                    const float* b, int ldb, float beta, float* c, int ldc);

void cblas_sgemm(int order, int transpose_a, int transpose_b, int m, int n, int k, float alpha, const float* a, int lda, const float* b,
                 int ldb, float beta, float* c, int ldc) {
  OPENBLAS_SGEMM(order, transpose_a, transpose_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
}
