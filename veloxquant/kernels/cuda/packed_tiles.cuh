// Codes of tiles, patches and tables as packed_attention.cuh reads them, and the instructions it is made of.
#pragma once

#include "veloxquant/kernels/cuda/packed_common.cuh"
#include "veloxquant/kernels/cuda/packed_units.h"

namespace veloxquant {

// Weights are so much larger, so that small ones stay normal numbers in half precision.
constexpr float kWeightShift = 12.0f;

__device__ __forceinline__ void multiply(float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                                         unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ unsigned transposed(unsigned x) {
  unsigned y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

__device__ __forceinline__ unsigned part(const uint4& x, int i) {
  return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w;
}

// Copies 16 bytes to shared memory, past the registers.
__device__ __forceinline__ void copy_later(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(to))), "l"(from));
}
__device__ __forceinline__ void prefetch(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;");
}
// Until no more than `kLeft` commits are open.
template <int kLeft>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// Codes of a tile in shared memory: rows of 128 bytes, four codes of 32 tokens.  Lanes read two neighbouring rows at once: every
// row is shifted on by two places of 16 bytes.
struct TileCodes {
  unsigned char* bytes;
  int codes;

  __device__ __forceinline__ static int place(int row, int chunk) { return row * 128 + ((chunk + 2 * row) & 7) * 16; }

  __device__ __forceinline__ void load_later(const unsigned char* from) const {
#pragma unroll 2
    for (int i = threadIdx.x % 32; i < 2 * codes; i += 32)
      copy_later(bytes + (i / 8 < codes / 4 ? place(i / 8, i % 8) : 16 * i), from + 16 * i);
  }

  // Of tokens first … first + 3 the word that holds `code`; first is a multiple of 4.  kWhole: there are whole rows only.
  template <bool kWhole>
  __device__ __forceinline__ uint4 words(int code, int first) const {
    const int row = code >> 2, rest = codes - 4 * row;
    if (kWhole || rest >= 4) return *reinterpret_cast<const uint4*>(bytes + place(row, first >> 2));
    // The last one to three codes of a token stand together.
    const unsigned char* at = bytes + row * 128 + first * rest + (code & 3);
    const int shift = 8 * (code & 3);
    return {static_cast<unsigned>(at[0]) << shift, static_cast<unsigned>(at[rest]) << shift,
            static_cast<unsigned>(at[2 * rest]) << shift, static_cast<unsigned>(at[3 * rest]) << shift};
  }
};

struct AttentionCodes {
  const unsigned *closed, *open;  // blocks of a layer [batch, num_closed, block_words] and the one that grows [batch, block_words]
  int num_closed, block_words, tokens, kv_heads;
};

// One side of one head of one sequence.
struct HeadCodes {
  const unsigned *closed, *open;
  int num_closed, block_words, codes, patches, patch_bytes;

  __device__ __forceinline__ const unsigned char* block(int index) const {
    return reinterpret_cast<const unsigned char*>(index < num_closed ? closed + static_cast<long long>(index) * block_words : open);
  }
  __device__ __forceinline__ const unsigned char* tile(int index) const {
    return block(index / kTilesOfBlock) + index % kTilesOfBlock * codes * kTileTokens;
  }
  // Behind the codes: place in the block, scale as half, residuals of 4 bits.
  __device__ const unsigned char* patch(int block_index, int i) const {
    return block(block_index) + codes * kTileTokens * kTilesOfBlock + i * patch_bytes;
  }
  __device__ int patches_of(int block_index, int tokens) const {
    return min(patches, tokens - block_index * kTileTokens * kTilesOfBlock);
  }
};

__device__ __forceinline__ float patch_scale(const unsigned char* patch) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(patch[1] | patch[2] << 8)));
}

// One of its residuals, without its scale.
__device__ __forceinline__ float patch_rest(const unsigned char* patch, int column) {
  return static_cast<float>(patch[3 + column / 2] >> 4 * (column & 1) & 15) - kPatchCentre;
}

// Two columns of a patch's residuals, without its scale; column is even.
__device__ __forceinline__ __half2 patch_rests(const unsigned char* patch, int column) {
  const unsigned both = patch[3 + column / 2];
  // 0x5400 | b << 4 is the half 64 + b.
  return __hsub2(halves((both & 15) << 4 | (both & 240) << 16 | 0x54005400), __float2half2_rn(64 + kPatchCentre));
}

/// What a head's keys need beside their units, in which `rest_begin` and `rest_count` are columns of the rotated space here.
struct FullKeyTables {
  // [heads, kDim / 8, kUnits / 2, 32]: of each product of 16 columns with 8 places the two words of each lane, by the units'
  // scales.
  const uint2* inverse;
  const float* mean;      // [heads, kDim], by places
  const int* columns;     // [kDim]: the dimension of each place
  const unsigned* turns;  // [kDim / 2], of each plane, as KeyUnit has them
};

struct AttentionTables {
  const unsigned char *keys, *values;  // [heads, 256, 2, units, 8]
  const KeyUnit* key_units;            // [heads, kKeyUnits]
  const ValueUnit* value_units;        // [heads, kValueUnits]
  const __half* key_rests;             // [heads, kKeyUnits, 8, rest_columns]: what columns of a patch make of a unit, by its scale
  const HeadBlocks* heads;             // [kv_heads]
  FullKeyTables full;                  // where keys are not turned plane by plane
  int num_heads, rest_columns;         // heads: 1, where all KV heads share tables; a multiple of 8
};

}  // namespace veloxquant
