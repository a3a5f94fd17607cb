// Tokens of any plan out of their codes, a tile at a time in shared memory: what attention (packed_any_attention.cuh) and restoring
// (packed_restore.cuh) share.  No number of codes, units or dimensions is known when this is compiled, so that one kernel serves all
// layers.
#pragma once

#include "veloxquant/kernels/cuda/packed_common.cuh"
#include "veloxquant/kernels/cuda/packed_units.h"

namespace veloxquant {

constexpr int kLookUpWarps = kLookUpThreads / 32;

/// The tables of a layer, and its blocks of one sequence.
struct LayerCodes {
  const int* tables;
  const unsigned *closed, *open;  // blocks [num_closed, block_words], and the one that grows
  int num_closed, tokens;         // tokens: in all of them

  __device__ const LayerTables& layer() const { return *reinterpret_cast<const LayerTables*>(tables); }
  template <class T>
  __device__ const T* at(int word) const {
    return reinterpret_cast<const T*>(tables + word);
  }
  __device__ const SideTables& side(int side, int head) const {
    return at<SideTables>(layer().sides)[side * layer().kv_heads + head];
  }
  __device__ const unsigned char* block(const SideTables& side, int index) const {
    const long long words = static_cast<long long>(index) * layer().block_words;
    return reinterpret_cast<const unsigned char*>((index < num_closed ? closed + words : open) + side.word);
  }
};

__device__ __forceinline__ int patch_bytes_of(int dim) {
  return 3 + (dim + 1) / 2;
}

/// Where a code of a token stands in its block.
__device__ __forceinline__ int code_place(const SideTables& side, int code, int token) {
  if (side.order == CodeOrder::kScan)
    return code * kTileTokens * kTilesOfBlock + token / 64 * 64 + token % 16 * 4 + token % 64 / 16;
  const int word = code / 4, rest = side.codes - 4 * word;
  return token / kTileTokens * side.codes * kTileTokens + word * 4 * kTileTokens + code % 4 +
         token % kTileTokens * (rest < 4 ? rest : 4);
}

/// A tile of one side of one head, tokens kTileTokens · tile … of the codes.  Threads of a block work on it together; lanes are
/// tokens.  Between the calls below all threads must have come along (__syncthreads).
struct Tile {
  const LayerCodes& of;
  const SideTables& side;
  int tile;

  __device__ int index() const { return tile / kTilesOfBlock; }
  __device__ const unsigned char* block() const { return of.block(side, index()); }

  /// Sums of entries → columns [dim][kTileStride], by `warps` warps of which this is one.  Keys in planes come turned from `position`,
  /// that of the first coded token.
  __device__ void look_up(float* columns, int position, int warp, int warps) const {
    const int token = threadIdx.x % 32, place = tile % kTilesOfBlock * kTileTokens + token;
    const unsigned char* codes = block();
    const auto* units = of.at<TableUnit>(side.units);
    const unsigned at = position + tile * kTileTokens + token;
#pragma unroll 1
    for (int i = warp; i < side.num_units; i += warps) {
      const TableUnit& unit = units[i];
      const int first = codes[code_place(side, unit.codes[0], place)];
      float sums[kUnitDims];
      if (side.float_entries) {
        const auto* entry = of.at<float4>(side.entries) + 2 * (first * side.num_units + i);
        const float4 low = entry[0], high = entry[1];
        sums[0] = low.x, sums[1] = low.y, sums[2] = low.z, sums[3] = low.w;
        sums[4] = high.x, sums[5] = high.y, sums[6] = high.z, sums[7] = high.w;
      } else {
        const int second = codes[code_place(side, unit.codes[1], place)];
        const auto* entries = of.at<uint2>(side.entries);
        const uint2 a = entries[2 * first * side.num_units + i], b = entries[(2 * second + 1) * side.num_units + i];
        const unsigned low = a.x + b.x, high = a.y + b.y;
#pragma unroll
        for (int j = 0; j < kUnitDims; ++j)
          sums[j] = unit.scale * static_cast<float>((j < 4 ? low : high) >> 8 * (j % 4) & 255u) + unit.low[j];
      }
      if (side.planes) {
#pragma unroll
        for (int j = 0; j < kUnitDims; j += 2)
          if (j < unit.width) turn(sums[j], sums[j + 1], (unit.column + j) / 2, at);
      }
#pragma unroll
      for (int j = 0; j < kUnitDims; ++j)
        if (j < unit.width) columns[(unit.column + j) * kTileStride + token] = sums[j];
    }
  }

  /// Adds what patches say of tokens of the tile.
  __device__ void add_patches(float* columns, int position) const {
    if (side.patches == 0) return;
    const int held = min(side.patches, of.tokens - index() * kTileTokens * kTilesOfBlock), lane = threadIdx.x % 32,
              bytes = patch_bytes_of(of.layer().dim);
    const unsigned char* patches = block() + side.codes * kTileTokens * kTilesOfBlock;
    // Every warp looks for those of the tile; most tiles have none.
    static_assert(kMostPatches == 64, "bits of a word");
    unsigned long long found = 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int p = 32 * i + lane, place = p < held ? patches[p * bytes] : 0;
      const bool here = p < held && place / kTileTokens == tile % kTilesOfBlock;
      found |= static_cast<unsigned long long>(__ballot_sync(~0u, here)) << 32 * i;
    }
#pragma unroll 1
    for (; found != 0; found &= found - 1) add_patch(patches + (__ffsll(found) - 1) * bytes, columns, position);
  }

  /// Out of the rotated space: columns → vectors [dim][kTileStride], keys in the order of `dims`, turned.
  __device__ void multiply_back(const float* columns, float* vectors, bool keys, int position) const {
    constexpr int kAtOnce = 4;
    const int dim = of.layer().dim, token = threadIdx.x % 32;
    const auto *inverse = of.at<float>(side.inverse), *mean = of.at<float>(side.inverse_mean);
#pragma unroll 1
    for (int first = threadIdx.x / 32 * kAtOnce; first < dim; first += kLookUpWarps * kAtOnce) {
      float sums[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) sums[j] = first + j < dim ? mean[first + j] : 0.0f;
      if (dim % kAtOnce == 0) {
#pragma unroll 4
        for (int i = 0; i < dim; ++i) {
          const float z = columns[i * kTileStride + token];
          const float4 row = *reinterpret_cast<const float4*>(inverse + i * dim + first);
          sums[0] += z * row.x, sums[1] += z * row.y, sums[2] += z * row.z, sums[3] += z * row.w;
        }
      } else {
#pragma unroll 4
        for (int i = 0; i < dim; ++i) {
          const float z = columns[i * kTileStride + token];
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j) sums[j] += first + j < dim ? z * inverse[i * dim + first + j] : 0.0f;
        }
      }
      if (keys) {
        const unsigned at = position + tile * kTileTokens + token;
#pragma unroll
        for (int j = 0; j < kAtOnce; j += 2)
          if (first + j + 1 < dim) turn(sums[j], sums[j + 1], (first + j) / 2, at);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j)
        if (first + j < dim) vectors[(first + j) * kTileStride + token] = sums[j];
    }
  }

 private:
  // Of a token of the tile.
  __device__ void add_patch(const unsigned char* patch, float* columns, int position) const {
    const int dim = of.layer().dim, token = patch[0] % kTileTokens;
    const float scale = __half2float(__ushort_as_half(static_cast<unsigned short>(patch[1] | patch[2] << 8)));
    const auto rest = [&](int i) { return scale * (static_cast<float>(patch[3 + i / 2] >> 4 * (i & 1) & 15) - kPatchCentre); };
    if (!side.planes) {
#pragma unroll 1
      for (int i = threadIdx.x; i < dim; i += kLookUpThreads) columns[i * kTileStride + token] += rest(i);
      return;
    }
    const auto* inverse = of.at<float>(side.inverse);
#pragma unroll 1
    for (int pair = threadIdx.x; pair < dim / 2; pair += kLookUpThreads) {
      float x = 0, y = 0;
#pragma unroll 4
      for (int i = 0; i < dim; ++i) x += rest(i) * inverse[i * dim + 2 * pair], y += rest(i) * inverse[i * dim + 2 * pair + 1];
      turn(x, y, pair, position + tile * kTileTokens + token);
      columns[2 * pair * kTileStride + token] += x;
      columns[(2 * pair + 1) * kTileStride + token] += y;
    }
  }

  // By the position of their token.  Pairs that RoPE leaves alone are not lengthened either.
  __device__ __forceinline__ void turn(float& x, float& y, int pair, unsigned position) const {
    if (pair >= of.layer().turned) return;
    const float2 angle = cosine_and_sine(of.at<unsigned>(side.turns)[pair], position);
    const float magnitude = of.layer().magnitude;
    turn_back(x, y, magnitude * angle.x, -magnitude * angle.y);
  }
};

}  // namespace veloxquant
