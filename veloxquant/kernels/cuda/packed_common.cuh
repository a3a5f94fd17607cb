// What the kernels of packed caches share.  Compiled by MLX at run time, and by nvcc for tests and benchmarks.
#pragma once

#include <cuda_fp16.h>

#include "veloxquant/kernels/cuda/packed_units.h"

namespace veloxquant {

constexpr float kHidden = -1e30f;  // a score that does not count

__device__ __forceinline__ unsigned bits_of(__half2 x) {
  return *reinterpret_cast<unsigned*>(&x);
}
__device__ __forceinline__ __half2 halves(unsigned x) {
  return *reinterpret_cast<__half2*>(&x);
}
__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Of what `turns`, as KeyUnit has them, make at a position.
__device__ __forceinline__ float2 cosine_and_sine(unsigned turns, unsigned position) {
  const float radians = 0x1p-31f * 3.14159265f * static_cast<float>(static_cast<int>(turns * position));  // from −π to π
  return {__cosf(radians), __sinf(radians)};
}

__device__ __forceinline__ void turn_back(float& x, float& y, float cosine, float sine) {
  const float old = x;
  x = x * cosine + y * sine;
  y = y * cosine - old * sine;
}

// c · tanh(x / c), x and c by log₂ e; exact to 10⁻⁶ of c.
__device__ __forceinline__ float capped(float x, float cap) {
  return cap * (1.0f - __fdividef(2.0f, 1.0f + power_of_two(2.0f * 1.44269504f * __fdividef(x, cap))));
}

struct QueryRows {
  const float* q;   // [batch · kv_heads, rows, dim], turned by their position
  int rows, dim;    // rows: query heads of a KV head
  float scale;      // of the scores, by log₂ e
  float soft_cap;   // 0: none; by log₂ e
  int position;     // of the first coded token
  float magnitude;  // of the turned keys
};

// Of each split, relative to a maximum of its own, in powers of two.
struct AttentionParts {
  float *maxima, *totals;  // [batch · kv_heads, splits + 1, rows], the last of the exact tokens
  float* sums;             // [batch · kv_heads, splits + 1, rows, dim], of codes in the rotated space
};

// Tokens that are 8 bits: sinks, then the window in a ring.  A token: for each 64 dimensions scale and bias as half, then its
// codes.
struct ExactTokens {
  const unsigned char* bytes;        // [batch, kv_heads, 2, sinks + window, exact_token_bytes(dim)]
  int sinks, window, coded, offset;  // the last two: tokens that are codes, which follow the sinks, and all
  const unsigned* turns;             // [turned], of the pairs (i, i + turned) of keys, as KeyUnit has them
  int turned;                        // 0: keys are stored turned
};

__device__ __forceinline__ int exact_groups(int dim) {
  return (dim + kExactGroup - 1) / kExactGroup;
}
__device__ __forceinline__ int exact_token_bytes(int dim) {
  return 4 * exact_groups(dim) + dim;
}
__device__ __forceinline__ float exact_value(const unsigned char* token, int dim, int i) {
  const unsigned char* scale = token + 4 * (i / kExactGroup);
  const auto half_at = [](const unsigned char* at) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(at[0] | at[1] << 8)));
  };
  return half_at(scale) * static_cast<float>(token[4 * exact_groups(dim) + i]) + half_at(scale + 2);
}

// Four from i on, i and dim multiples of 4 and the token at a multiple of 4 bytes, or one; zeros where the token is not there.
__device__ __forceinline__ void exact_values(const unsigned char* token, int dim, int i, bool four, bool there, float (&values)[4]) {
  if (!there) {
    values[0] = values[1] = values[2] = values[3] = 0;
  } else if (!four) {
    values[0] = exact_value(token, dim, i);
  } else {
    const unsigned scales = reinterpret_cast<const unsigned*>(token)[i / kExactGroup],
                   codes = *reinterpret_cast<const unsigned*>(token + 4 * exact_groups(dim) + i);
    const float scale = __half2float(__ushort_as_half(static_cast<unsigned short>(scales))),
                bias = __half2float(__ushort_as_half(static_cast<unsigned short>(scales >> 16)));
#pragma unroll
    for (int j = 0; j < 4; ++j) values[j] = scale * static_cast<float>(codes >> 8 * j & 255u) + bias;
  }
}

}  // namespace veloxquant
