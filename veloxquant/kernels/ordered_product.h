// Matrix products whose sums have one order, for what codes are chosen by: a library's product rounds by its kernel and by the
// number of rows, and one bit decides between two codes that are equally near.
#pragma once

#include <cstddef>

namespace veloxquant {

/// y [rows, out] = start + x [rows, in] · m [in, out]: x `x_stride` and y `y_stride` floats apart, m dense, start [out] or null for
/// zeros; y overlaps nothing.
///
/// An element of y is one chain, y ← y + x[k]·m[k] for k = 0, 1, …, each step rounded once: the same bits for any number of rows,
/// on every thread, and on every instruction set that has such a step (AVX2 and what came after it, NEON).  Those of before 2013
/// round product and sum, and give bits of their own.
void ordered_product(const float* x, std::size_t rows, std::size_t in, std::size_t x_stride, const float* m, std::size_t out,
                     const float* start, float* y, std::size_t y_stride);

namespace reference {
void ordered_product(const float* x, std::size_t rows, std::size_t in, std::size_t x_stride, const float* m, std::size_t out,
                     const float* start, float* y, std::size_t y_stride);
}

}  // namespace veloxquant
