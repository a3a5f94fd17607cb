// The text of our CUDA kernels, for MLX's run-time compiler.
#pragma once

namespace veloxquant {

extern const char* const kCudaSource;  // packed_units.h, packed_attention.cuh, packed_encoding.cuh

}  // namespace veloxquant
