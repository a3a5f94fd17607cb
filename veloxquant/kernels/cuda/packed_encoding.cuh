// One new token for PackedArrays (cache/packed_arrays.h) by one kernel: the token is rounded to 8 bits and takes its place in the
// window, and the one that leaves it is encoded as RotatedPqQuantizer does, with what that means for the patches of the block that
// grows.  Nothing is changed in place: what was stored is copied on the way, which is little.
#pragma once

#include "veloxquant/kernels/cuda/packed_common.cuh"
#include "veloxquant/kernels/cuda/packed_units.h"

namespace veloxquant {

struct EncodingTables {
  const float *transform, *mean;      // [2, heads, dim, dim], [2, heads, dim]
  const float* tables;                // of all sub-spaces
  const EncodingSubspace* subspaces;  // [2, heads, most_subspaces]
  const EncodingHead* heads;          // [2, kv_heads]
  int num_heads, most_subspaces;      // heads: 1, where all KV heads share tables
};

// As they are before and after, each whole.
struct EncodingState {
  const unsigned char *exact, *open;  // [batch, kv_heads, 2, places, exact_token_bytes], [batch, block_bytes]
  const float* errors;                // [batch, num_errors]
  PackedCounts counts;
  unsigned char *new_exact, *new_open;
  float* new_errors;
  PackedCounts* new_counts;
  int sinks, window, block_bytes, num_errors;
};

// Where the new token goes, and which leaves: a token is encoded when more than `window` follow the codes.
struct EncodingPlaces {
  bool leaves;
  int exact;    // of the new token among the exact ones; −1: it is not kept there
  int leaving;  // of the token that leaves; −1: it is the new one
  int at;       // its place in the block that grows

  __device__ explicit EncodingPlaces(const EncodingState& state)
      : leaves(state.counts.offset + 1 - state.window - state.sinks > state.counts.coded),
        exact(state.counts.offset < state.sinks ? state.counts.offset
              : state.window > 0                ? state.sinks + state.counts.offset % state.window
                                                : -1),
        leaving(state.window > 0 ? state.sinks + (state.sinks + state.counts.coded) % state.window : -1),
        at(state.counts.coded % (kTileTokens * kTilesOfBlock)) {}
};

// The largest of a block of threads' values, or their sum; all threads get it.
template <class Combine>
__device__ __forceinline__ float over_block(float x, float* scratch, Combine combine) {
  for (int other = 16; other > 0; other /= 2) x = combine(x, __shfl_xor_sync(~0u, x, other));
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  x = scratch[0];
  for (int i = 1; i < static_cast<int>(blockDim.x) / 32; ++i) x = combine(x, scratch[i]);
  return x;
}

__device__ __forceinline__ unsigned half_of(float x) {
  return __half_as_ushort(__float2half_rn(fminf(fmaxf(x, -65504.0f), 65504.0f)));
}
__device__ __forceinline__ float from_half(unsigned bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

// As AffineQuantizer with 8 bits: a warp for each group of 64.
__device__ __forceinline__ void round_token(const float* x, int dim, unsigned char* bytes) {
  const int lane = threadIdx.x % 32, groups = exact_groups(dim);
  for (int group = threadIdx.x / 32; group < groups; group += blockDim.x / 32) {
    const int begin = group * kExactGroup, end = min(begin + kExactGroup, dim);
    float low = 3e38f, high = -3e38f;
    for (int i = begin + lane; i < end; i += 32) low = fminf(low, x[i]), high = fmaxf(high, x[i]);
    for (int other = 16; other > 0; other /= 2)
      low = fminf(low, __shfl_xor_sync(~0u, low, other)), high = fmaxf(high, __shfl_xor_sync(~0u, high, other));
    const bool low_is_larger = fabsf(low) > fabsf(high);
    const float width = fmaxf(__fdiv_rn(high - low, 255.0f), 1e-7f), signed_width = low_is_larger ? width : -width,
                edge = low_is_larger ? low : high, zero_code = rintf(__fdiv_rn(edge, signed_width));
    const unsigned scale_bits = half_of(zero_code == 0 ? signed_width : __fdiv_rn(edge, zero_code)),
                   bias_bits = half_of(zero_code == 0 ? 0.0f : edge);
    const float scale = from_half(scale_bits), bias = from_half(bias_bits);
    if (lane < 4) bytes[4 * group + lane] = static_cast<unsigned char>((lane < 2 ? scale_bits : bias_bits) >> 8 * (lane % 2));
    for (int i = begin + lane; i < end; i += 32)
      bytes[4 * groups + i] =
          static_cast<unsigned char>(rintf(fminf(fmaxf(scale == 0 ? 0.0f : __fdiv_rn(x[i] - bias, scale), 0.0f), 255.0f)));
  }
}

// The least of a warp's values, the first of equal ones.
__device__ __forceinline__ void least_of_warp(float& value, int& index) {
  for (int other = 16; other > 0; other /= 2) {
    const float its = __shfl_xor_sync(~0u, value, other);
    const int its_index = __shfl_xor_sync(~0u, index, other);
    if (its < value || (its == value && its_index < index)) value = its, index = its_index;
  }
}

// A warp: codes of z, and what they leave of it.  Pairs are sought from the kBeam entries of the first table that are nearest.
__device__ __forceinline__ void encode_subspace(const EncodingSubspace& of, const float* tables, const float* z,
                                                float (*tried)[kBeam], int* codes, float* rest) {
  constexpr int kOfLane = kEntries / 32;
  const int lane = threadIdx.x % 32, width = of.width, size = (width + 1) * kEntries;
  const float *first = tables + of.table, *second = first + size;
  float scores[kOfLane];
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) scores[i] = first[width * kEntries + lane + 32 * i];
  for (int d = 0; d < width; ++d) {
    const float x = z[of.column + d];
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) scores[i] -= x * first[d * kEntries + lane + 32 * i];
  }
  const auto nearest = [&](float& value) {
    int index = kEntries;
    value = 3e38f;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i)
      if (scores[i] < value) value = scores[i], index = lane + 32 * i;
    least_of_warp(value, index);
    return index;
  };
  float value;
  if (of.stages == 1) {
    const int code = nearest(value);
    if (lane == 0) codes[of.first_code] = code;
    for (int d = lane; d < width; d += 32) rest[of.column + d] = z[of.column + d] - first[d * kEntries + code];
    return;
  }
  int candidates[kBeam];
  float first_scores[kBeam];
#pragma unroll
  for (int b = 0; b < kBeam; ++b) {
    candidates[b] = nearest(first_scores[b]);
    if (candidates[b] >= kEntries) candidates[b] = 0, first_scores[b] = 3e37f;  // fewer entries than the beam is wide
#pragma unroll
    for (int i = 0; i < kOfLane; ++i)
      if (candidates[b] == lane + 32 * i) scores[i] = 3e38f;
  }
  for (int d = lane; d < width; d += 32)
#pragma unroll
    for (int b = 0; b < kBeam; ++b) tried[d][b] = z[of.column + d] - first[d * kEntries + candidates[b]];
  __syncwarp();
  // With an entry of the first table the second one has what that leaves to describe.
  float best = 3e38f;
  int best_pair = kBeam * kEntries;
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) {
    const int entry = lane + 32 * i;
    float sums[kBeam];
    const float norm = second[width * kEntries + entry];
#pragma unroll
    for (int b = 0; b < kBeam; ++b) sums[b] = norm + first_scores[b];
    for (int d = 0; d < width; ++d) {
      const float x = second[d * kEntries + entry];
#pragma unroll
      for (int b = 0; b < kBeam; ++b) sums[b] -= tried[d][b] * x;
    }
#pragma unroll
    for (int b = 0; b < kBeam; ++b)
      if (sums[b] < best || (sums[b] == best && b * kEntries + entry < best_pair)) best = sums[b], best_pair = b * kEntries + entry;
  }
  least_of_warp(best, best_pair);
  const int beam = best_pair / kEntries, code = best_pair % kEntries;
  int first_code = 0;
#pragma unroll
  for (int b = 0; b < kBeam; ++b)
    if (b == beam) first_code = candidates[b];
  if (lane == 0) codes[of.first_code] = first_code, codes[of.first_code + 1] = code;
  for (int d = lane; d < width; d += 32) rest[of.column + d] = tried[d][beam] - second[d * kEntries + code];
  __syncwarp();
}

// A block of kEncodingThreads for each side of each KV head; the grid is 2 × batch · kv_heads.  x [batch, kv_heads, dim] of both
// sides.
template <int kDim>
__device__ __forceinline__ void encode_token(const float* new_keys, const float* new_values, const EncodingTables& tables,
                                             const EncodingState& state, int kv_heads) {
  constexpr int kWarps = kEncodingThreads / 32;
  __shared__ float x[kDim], z[kDim], rest[kDim], tried[kWarps][kMostWidth][kBeam], scratch[kWarps], errors[kMostPatches],
      pieces[kEncodingThreads];
  __shared__ int codes[kDim];
  __shared__ unsigned char token[kDim + 4 * ((kDim + kExactGroup - 1) / kExactGroup)];
  const int side = blockIdx.x, sequence_head = blockIdx.y, head = sequence_head % kv_heads, sequence = sequence_head / kv_heads,
            table = side * tables.num_heads + (tables.num_heads == 1 ? 0 : head), warp = threadIdx.x / 32;
  const EncodingHead of = tables.heads[side * kv_heads + head];
  const EncodingPlaces places(state);
  const int exact_tokens = state.sinks + state.window;
  if (threadIdx.x == 0 && blockIdx.x == 0 && blockIdx.y == 0)
    *state.new_counts = {state.counts.coded + places.leaves, state.counts.offset + 1};
  const float* arrived = (side == 0 ? new_keys : new_values) + static_cast<long long>(sequence_head) * kDim;
  for (int i = threadIdx.x; i < kDim; i += kEncodingThreads) x[i] = arrived[i];
  __syncthreads();

  // The window.
  const int token_bytes = exact_token_bytes(kDim);
  const long long first_exact = (static_cast<long long>(sequence_head) * 2 + side) * exact_tokens * token_bytes;
  if (places.exact >= 0) {
    round_token(x, kDim, token);
    __syncthreads();
  }
  for (int i = threadIdx.x; i < exact_tokens * token_bytes; i += kEncodingThreads)
    state.new_exact[first_exact + i] = i / token_bytes == places.exact ? token[i % token_bytes] : state.exact[first_exact + i];

  // The block that grows, as it was.
  const int patch_bytes = 3 + (kDim + 1) / 2, code_bytes = of.codes * kTileTokens * kTilesOfBlock,
            bytes = (code_bytes + of.patches * patch_bytes + 15) / 16 * 16, held = min(of.patches, places.at);
  const long long first_byte = static_cast<long long>(sequence) * state.block_bytes + 4 * of.word;
  const unsigned char* before = state.open + first_byte;
  unsigned char* after = state.new_open + first_byte;
  const bool fresh = places.leaves && places.at == 0;
  for (int i = threadIdx.x; i < bytes / 16; i += kEncodingThreads)
    reinterpret_cast<uint4*>(after)[i] = fresh ? uint4{0, 0, 0, 0} : reinterpret_cast<const uint4*>(before)[i];
  const long long first_error = static_cast<long long>(sequence) * state.num_errors + of.error;
  for (int p = threadIdx.x; p < of.patches; p += kEncodingThreads) {
    errors[p] = p < held ? state.errors[first_error + p] : 0.0f;
    state.new_errors[first_error + p] = errors[p];
  }
  if (!places.leaves) return;

  // Into the rotated space.
  if (places.leaving >= 0)
    for (int i = threadIdx.x; i < kDim; i += kEncodingThreads)
      x[i] = exact_value(state.exact + first_exact + static_cast<long long>(places.leaving) * token_bytes, kDim, i);
  __syncthreads();
  const float *transform = tables.transform + static_cast<long long>(table) * kDim * kDim, *mean = tables.mean + table * kDim;
  constexpr int kShares = kEncodingThreads / kDim > 0 ? kEncodingThreads / kDim : 1;
  for (int column = threadIdx.x % kDim, share = threadIdx.x / kDim; share < kShares && column < kDim; column += kEncodingThreads) {
    float sum = 0;
#pragma unroll 8
    for (int i = share; i < kDim; i += kShares) sum += (x[i] - mean[i]) * transform[i * kDim + column];
    if (kShares == 1)
      z[column] = sum;
    else
      pieces[share * kDim + column] = sum;
  }
  __syncthreads();
  if (kShares > 1 && threadIdx.x < kDim) {
    float sum = 0;
    for (int share = 0; share < kShares; ++share) sum += pieces[share * kDim + threadIdx.x];
    z[threadIdx.x] = sum;
  }
  __syncthreads();
  for (int subspace = warp; subspace < of.subspaces; subspace += kWarps)
    encode_subspace(tables.subspaces[table * tables.most_subspaces + subspace], tables.tables, z, tried[warp], codes, rest);
  __syncthreads();
  for (int code = threadIdx.x; code < of.codes; code += kEncodingThreads) {
    const int word = code / 4, stride = min(4, of.codes - 4 * word);
    after[places.at / kTileTokens * of.codes * kTileTokens + word * 4 * kTileTokens + code % 4 + places.at % kTileTokens * stride] =
        static_cast<unsigned char>(codes[code]);
  }
  if (of.patches == 0) return;

  // The tokens that lose most have the patches: one that loses more takes the place of the one that loses least, of equal ones the
  // last.
  float square = 0, magnitude = 0;
  for (int i = threadIdx.x; i < kDim; i += kEncodingThreads)
    square += rest[i] * rest[i], magnitude = fmaxf(magnitude, fabsf(rest[i]));
  const float error = over_block(square, scratch, [](float a, float b) { return a + b; });
  magnitude = over_block(magnitude, scratch, [](float a, float b) { return fmaxf(a, b); });
  int place = held;
  if (held == of.patches) {
    int least = 0;
    for (int p = 1; p < held; ++p)
      if (errors[p] <= errors[least]) least = p;
    if (error <= errors[least]) return;
    for (int i = threadIdx.x; i < (held - 1 - least) * patch_bytes; i += kEncodingThreads)
      after[code_bytes + least * patch_bytes + i] = before[code_bytes + (least + 1) * patch_bytes + i];
    for (int p = least + threadIdx.x; p < held - 1; p += kEncodingThreads) state.new_errors[first_error + p] = errors[p + 1];
    place = held - 1;
  }
  unsigned char* patch = after + code_bytes + place * patch_bytes;
  const unsigned scale_bits = half_of(magnitude / kPatchCentre);
  const float scale = from_half(scale_bits);
  for (int i = threadIdx.x; i < patch_bytes; i += kEncodingThreads) {
    const auto code = [&](int column) {
      return column < kDim && scale > 0
                 ? static_cast<unsigned>(rintf(fminf(fmaxf(__fdiv_rn(rest[column], scale) + kPatchCentre, 0.0f), 2 * kPatchCentre)))
                 : 0u;
    };
    patch[i] = static_cast<unsigned char>(i == 0  ? places.at
                                          : i < 3 ? scale_bits >> 8 * (i - 1)
                                                  : code(2 * (i - 3)) | code(2 * (i - 3) + 1) << 4);
  }
  if (threadIdx.x == 0) state.new_errors[first_error + place] = error;
}

}  // namespace veloxquant
