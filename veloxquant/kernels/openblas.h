// What is called of OpenBLAS, by names that do not depend on how it was built: that of the Python package has a prefix before each
// of its own.  Declared here, not by its cblas.h: that header's names and types would clash with MLX's copy of another one.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace veloxquant::openblas {

// Fortran's interfaces: arrays by columns.  32-bit integers.
void sgemm(char transpose_a, char transpose_b, int m, int n, int k, float alpha, const float* a, int lda, const float* b, int ldb,
           float beta, float* c, int ldc);
void sgemv(char transpose, int m, int n, float alpha, const float* a, int lda, const float* x, int incx, float beta, float* y,
           int incy);
int dsyev(int n, double* a, double* w, double* work, int work_size);  // eigenvectors into a [n, n] → info
int dgesv(int n, double* a, int* pivots, double* b);                  // a, b [n, n] → info

void set_num_threads(int threads);

/// "OpenBLAS 0.3.34 DYNAMIC_ARCH …", and the processor that its kernels are for, such as "Haswell".
std::string config();
std::string core();

/// Why products are slower than they need be, and what helps, in one line; empty if the kernel for `core` has vectors as wide as
/// the processor's, or is not known.  targets: hwy::SupportedTargets(); core_type: OPENBLAS_CORETYPE, empty if it is not set.
std::string narrow_kernel(std::string_view core, std::string_view config, std::int64_t targets, std::string_view core_type);

/// Warns, once a process, of what narrow_kernel() says here.
void warn_of_narrow_kernel();

}  // namespace veloxquant::openblas
