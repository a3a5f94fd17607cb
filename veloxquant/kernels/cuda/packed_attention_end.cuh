// The end of attention over packed codes: the parts that packed_attention.cuh left, together and out of the rotated space.
#pragma once

#include "veloxquant/kernels/cuda/packed_common.cuh"

namespace veloxquant {

// Adds up the parts → out [batch · kv_heads, rows, dim]: `splits` of codes, in the rotated space, which inverse [dim, dim] and mean
// [dim] of the KV head bring back, then `exact_splits` of vectors.  A block of kFinishThreads for each KV head, four rows and
// kColumnsAtOnce columns, finish_floats() floats of shared memory.
__device__ __forceinline__ void finish_attention(const AttentionParts& parts, int splits, int exact_splits, const QueryRows& queries,
                                                 const float* inverse_of_head, const float* mean, float* out, void* shared) {
  const int sequence_head = blockIdx.x, column = blockIdx.y * kColumnsAtOnce + threadIdx.x % kColumnsAtOnce,
            first_row = blockIdx.z * kQueriesAtOnce, rows = min(kQueriesAtOnce, queries.rows - first_row), dim = queries.dim,
            lane = threadIdx.x % 32, all_parts = splits + exact_splits;
  float* sums = static_cast<float*>(shared);                // [rows, dim], in the rotated space
  float* weights = sums + kQueriesAtOnce * dim;             // [rows, parts]
  float* totals = weights + kQueriesAtOnce * all_parts;  // [rows]: of codes; then, by all, of what is left
  float* pieces = totals + kQueriesAtOnce;                  // [shares, rows, columns]
  const long long first = static_cast<long long>(sequence_head) * all_parts * queries.rows + first_row;
  const int share = threadIdx.x / kColumnsAtOnce;
  constexpr int kShares = kFinishThreads / kColumnsAtOnce, kAhead = 16;
  // What is needed last is on its way first.
  const float* inverse = inverse_of_head + column;
  float entries[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i)
    entries[i] = column < dim && share + i * kShares < dim ? inverse[(share + i * kShares) * dim] : 0.0f;
  if (const int row = threadIdx.x / 32; row < rows) {
    float top = kHidden, coded = 0, all = 0;
#pragma unroll 1
    for (int i = lane; i < all_parts; i += 32) top = fmaxf(top, parts.maxima[first + i * queries.rows + row]);
    for (int other = 16; other > 0; other /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, other));
#pragma unroll 1
    for (int i = lane; i < all_parts; i += 32) {
      const float weight = power_of_two(parts.maxima[first + i * queries.rows + row] - top),
                  total = weight * parts.totals[first + i * queries.rows + row];
      weights[row * all_parts + i] = weight;
      all += total;
      if (i < splits) coded += total;
    }
    for (int other = 16; other > 0; other /= 2)
      coded += __shfl_xor_sync(~0u, coded, other), all += __shfl_xor_sync(~0u, all, other);
#pragma unroll 1
    for (int i = lane; i < all_parts; i += 32) weights[row * all_parts + i] /= all;
    if (lane == 0) totals[row] = coded / all;
  }
#pragma unroll 1
  for (int begin = 0; begin < rows * dim; begin += kFinishThreads) {
    const int i = begin + threadIdx.x;
    float sum = 0;
#pragma unroll 1
    for (int some = 0; some < splits; some += kAhead) {
      float parts_of[kAhead];
#pragma unroll
      for (int split = 0; split < kAhead; ++split)
        parts_of[split] =
            i < rows * dim && some + split < splits ? parts.sums[(first + (some + split) * queries.rows) * dim + i] : 0.0f;
      if (begin + some == 0) __syncthreads();
#pragma unroll
      for (int split = 0; split < kAhead; ++split)
        if (some + split < splits && i < rows * dim) sum += weights[i / dim * all_parts + some + split] * parts_of[split];
    }
    if (i < rows * dim) sums[i] = sum;
  }
  __syncthreads();
  float results[kQueriesAtOnce] = {};
  const auto add = [&](float entry, int i) {
#pragma unroll
    for (int row = 0; row < kQueriesAtOnce; ++row) results[row] += row < rows && i < dim ? entry * sums[row * dim + i] : 0.0f;
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) add(entries[i], share + i * kShares);
#pragma unroll 1
  for (int i = share + kAhead * kShares; i < dim && column < dim; i += kShares) add(inverse[i * dim], i);
#pragma unroll
  for (int row = 0; row < kQueriesAtOnce; ++row)
    pieces[(share * kQueriesAtOnce + row) * kColumnsAtOnce + threadIdx.x % kColumnsAtOnce] = results[row];
  __syncthreads();
  if (const int row = share; row < rows && column < dim) {
    float sum = mean[column] * totals[row];
#pragma unroll 1
    for (int part = splits; part < all_parts; ++part)
      sum += weights[row * all_parts + part] * parts.sums[(first + part * queries.rows + row) * dim + column];
    for (int piece = 0; piece < kShares; ++piece)
      sum += pieces[(piece * kQueriesAtOnce + row) * kColumnsAtOnce + threadIdx.x % kColumnsAtOnce];
    out[(static_cast<long long>(sequence_head) * queries.rows + first_row + row) * dim + column] = sum;
  }
}

}  // namespace veloxquant
