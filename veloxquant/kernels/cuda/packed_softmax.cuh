// Weights of queries of many tokens over restored codes and exact tokens: which they see, and the softmax over those.
#pragma once

#include "veloxquant/kernels/cuda/packed_common.cuh"
#include "veloxquant/kernels/cuda/packed_units.h"

namespace veloxquant {

/// Keys in the order in which restore_tile and copy_exact put them: codes, sinks, and the tokens behind the codes.
struct SeenKeys {
  int codes, first_code;  // how many, and the position of the first
  int sinks, begin;       // and the position of the first token behind
  int window, reach;      // of the window, and of a sliding one
  int all_see;            // positions below are read as codes by every query

  __device__ __forceinline__ bool operator()(int query, int key) const {
    if (key < codes) {
      const int position = first_code + key;
      return position < max(query + 1 - window, all_see) && query - position < reach;
    }
    const bool sink = key - codes < sinks;
    const int position = sink ? key - codes : begin + key - codes - sinks;
    return position <= query && query - position < (sink ? reach : min(reach, window));
  }
};

// scores and weights [rows, keys], a block of kSoftmaxThreads for each row; rows are the heads of a group, and in each `tokens` from
// position `first` on.  scale and soft_cap by log₂ e.
__device__ __forceinline__ void softmax_of_seen(const float* scores, float* weights, const SeenKeys& seen, int keys, int tokens,
                                                int first, float scale, float soft_cap) {
  constexpr int kWarps = kSoftmaxThreads / 32;
  __shared__ float tops[kWarps], totals[kWarps];
  const int query = first + static_cast<int>(blockIdx.x % static_cast<unsigned>(tokens)), lane = threadIdx.x % 32,
            warp = threadIdx.x / 32;
  const long long row = static_cast<long long>(blockIdx.x) * keys;
  const auto score_of = [&](int key) {
    const float score = scale * scores[row + key];
    return soft_cap > 0 ? capped(score, soft_cap) : score;
  };
  float top = kHidden, total = 0;
  for (int key = threadIdx.x; key < keys; key += kSoftmaxThreads) {
    if (!seen(query, key)) continue;
    const float score = score_of(key);
    if (score > top) total *= power_of_two(top - score), top = score;
    total += power_of_two(score - top);
  }
  const auto join = [&](float its_top, float its_total) {
    const float both = fmaxf(top, its_top);
    total = total * power_of_two(top - both) + its_total * power_of_two(its_top - both);
    top = both;
  };
#pragma unroll
  for (int other = 16; other > 0; other /= 2) {
    const float its_top = __shfl_xor_sync(~0u, top, other), its_total = __shfl_xor_sync(~0u, total, other);
    join(its_top, its_total);
  }
  if (lane == 0) tops[warp] = top, totals[warp] = total;
  __syncthreads();
  top = kHidden, total = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) join(tops[i], totals[i]);
  const float factor = 1.0f / total;
  for (int key = threadIdx.x; key < keys; key += kSoftmaxThreads)
    weights[row + key] = seen(query, key) ? factor * power_of_two(score_of(key) - top) : 0.0f;
}

}  // namespace veloxquant
