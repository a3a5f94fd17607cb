// Tokens that arrive, for PackedArrays (cache/packed_arrays.h): they are rounded to 8 bits and take their places in the window, and
// those that leave it are encoded as the quantizer does, with what that means for the patches of the block that grows.  One token
// takes one kernel; many take one that rounds, one that encodes and one that puts blocks together.  Nothing is changed in place: what
// was stored is copied on the way, which is little.
#pragma once

#include "veloxquant/kernels/cuda/packed_look_up.cuh"

namespace veloxquant {

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
#pragma unroll 1
  for (int group = threadIdx.x / 32; group < groups; group += blockDim.x / 32) {
    const int begin = group * kExactGroup, end = min(begin + kExactGroup, dim);
    float low = 3e38f, high = -3e38f;
#pragma unroll 1
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
#pragma unroll 1
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

// A warp: codes of z, and what they leave of it in its place.  Pairs are sought from the kBeam entries of the first table that are
// nearest; tried [width, kBeam] is scratch.  A lane has every 32nd entry.  All loads of a dimension are on their way at once, since
// they wait for memory much longer than sums take.
__device__ __forceinline__ void encode_subspace(const EncodingSubspace& of, const float* first, float* z, float* tried,
                                                unsigned char* codes) {
  constexpr int kOfLane = kEntries / 32;
  const int lane = threadIdx.x % 32, width = of.width, size = (width + 1) * kEntries;
  const float* second = first + size;
  z += of.column;
  float scores[kOfLane];
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) scores[i] = first[width * kEntries + lane + 32 * i];
#pragma unroll 4
  for (int d = 0; d < width; ++d) {
    const float x = z[d];
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
    if (lane == 0) codes[of.first_code] = static_cast<unsigned char>(code);
    for (int d = lane; d < width; d += 32) z[d] -= first[d * kEntries + code];
    __syncwarp();
    return;
  }
  // Lane b has the b-th nearest.
  int candidate = 0;
  float its_score = 0;
#pragma unroll 1
  for (int b = 0; b < kBeam; ++b) {
    int index = nearest(value);
    if (index >= kEntries) index = 0, value = 3e37f;  // fewer entries than the beam is wide
    if (lane == b) candidate = index, its_score = value;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i)
      if (index == lane + 32 * i) scores[i] = 3e38f;
  }
  const int own = __shfl_sync(~0u, candidate, lane % kBeam);
  for (int d = lane / kBeam; d < width; d += 32 / kBeam) tried[d * kBeam + lane % kBeam] = z[d] - first[d * kEntries + own];
  __syncwarp();
  // With an entry of the first table the second one has what that leaves to describe.
  float sums[kOfLane][kBeam];
#pragma unroll
  for (int i = 0; i < kOfLane; ++i) {
    const float norm = second[width * kEntries + lane + 32 * i];
#pragma unroll
    for (int b = 0; b < kBeam; ++b) sums[i][b] = norm + __shfl_sync(~0u, its_score, b);
  }
#pragma unroll 2
  for (int d = 0; d < width; ++d) {
    const float4 low = reinterpret_cast<const float4*>(tried)[2 * d], high = reinterpret_cast<const float4*>(tried)[2 * d + 1];
    const float rests[kBeam] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      const float x = second[d * kEntries + lane + 32 * i];
#pragma unroll
      for (int b = 0; b < kBeam; ++b) sums[i][b] -= rests[b] * x;
    }
  }
  float best = 3e38f;
  int best_pair = kBeam * kEntries;
#pragma unroll
  for (int i = 0; i < kOfLane; ++i)
#pragma unroll
    for (int b = 0; b < kBeam; ++b) {
      const int pair = b * kEntries + lane + 32 * i;
      if (sums[i][b] < best || (sums[i][b] == best && pair < best_pair)) best = sums[i][b], best_pair = pair;
    }
  least_of_warp(best, best_pair);
  const int beam = best_pair / kEntries, code = best_pair % kEntries, first_code = __shfl_sync(~0u, candidate, beam);
  if (lane == 0)
    codes[of.first_code] = static_cast<unsigned char>(first_code), codes[of.first_code + 1] = static_cast<unsigned char>(code);
  for (int d = lane; d < width; d += 32) z[d] = tried[d * kBeam + beam] - second[d * kEntries + code];
  __syncwarp();
}

/// Tokens of a sequence before, and after some that arrive: codes, and all.
struct Counts {
  int coded, offset, new_coded, new_offset;
};

/// One side of one head of one sequence.
struct SideOfHead {
  int side, head, sequence, kv_heads;

  __device__ SideOfHead(int side, int sequence_head, int kv_heads)
      : side(side), head(sequence_head % kv_heads), sequence(sequence_head / kv_heads), kv_heads(kv_heads) {}
  /// In [batch, kv_heads, 2].
  __device__ long long index() const { return (static_cast<long long>(sequence) * kv_heads + head) * 2 + side; }
};

// A patch: the place of its token in the block, a scale, and the rest [dim] in 4 bits.  Threads of a group, of which this is one.
__device__ __forceinline__ void write_patch(unsigned char* patch, int place, const float* rest, float magnitude, int dim, int thread,
                                            int threads) {
  const unsigned scale_bits = half_of(magnitude / kPatchCentre);
  const float scale = from_half(scale_bits);
  for (int i = thread; i < patch_bytes_of(dim); i += threads) {
    const auto code = [&](int column) {
      return column < dim && scale > 0
                 ? static_cast<unsigned>(rintf(fminf(fmaxf(__fdiv_rn(rest[column], scale) + kPatchCentre, 0.0f), 2 * kPatchCentre)))
                 : 0u;
    };
    patch[i] = static_cast<unsigned char>(i == 0  ? place
                                          : i < 3 ? scale_bits >> 8 * (i - 1)
                                                  : code(2 * (i - 3)) | code(2 * (i - 3) + 1) << 4);
  }
}

/// Bytes of a side's block, filled up to what a GPU loads at a time.
__device__ __forceinline__ int block_bytes_of(const SideTables& of, int dim) {
  return (of.codes * kTileTokens * kTilesOfBlock + of.patches * patch_bytes_of(dim) + 15) / 16 * 16;
}

/// What encode_token reads and writes, each array whole: exact [batch, kv_heads, 2, sinks + window, exact_token_bytes], open [batch,
/// block_words], errors [batch, num_errors], and the token, keys and values [batch, kv_heads, dim].
struct OneToken {
  const float *keys, *values;
  const unsigned char *exact, *open;
  const float* errors;
  unsigned char *new_exact, *new_open;
  float* new_errors;
};

// A block of kEncodingThreads for each side of each KV head, encode_token_floats() of shared memory; the grid is 2 × batch · kv_heads.
__device__ __forceinline__ void encode_token(const int* words, const Counts& counts, const OneToken& token, int most_width,
                                             float* shared) {
  constexpr int kWarps = kEncodingThreads / 32;
  const LayerCodes tables{words, nullptr, nullptr, 0, 0};
  const LayerTables& layer = tables.layer();
  const int dim = layer.dim, warp = threadIdx.x / 32, places = layer.sinks + layer.window, token_bytes = exact_token_bytes(dim);
  const SideOfHead at(blockIdx.x, blockIdx.y, layer.kv_heads);
  const SideTables& of = tables.side(at.side, at.head);
  float *x = shared, *z = x + dim, *pieces = z + dim, *tried = pieces + kEncodingThreads,
        *scratch = tried + kWarps * most_width * kBeam, *errors = scratch + kWarps;
  auto* rounded = reinterpret_cast<unsigned char*>(errors + kMostPatches);
  unsigned char* codes = rounded + (2 * dim + 16 + 3) / 4 * 4;

  // A token is encoded when more than `window` follow the codes.  Where the new one goes among the exact ones, −1: nowhere; and
  // which leaves, −1: the new one.
  const bool leaves = counts.new_coded > counts.coded;
  const int placed = counts.offset < layer.sinks ? counts.offset
                     : layer.window > 0          ? layer.sinks + counts.offset % layer.window
                                                 : -1,
            leaving = layer.window > 0 ? layer.sinks + (layer.sinks + counts.coded) % layer.window : -1,
            place = counts.coded % (kTileTokens * kTilesOfBlock);
  const float* arrived = (at.side == 0 ? token.keys : token.values) + static_cast<long long>(blockIdx.y) * dim;
#pragma unroll 1
  for (int i = threadIdx.x; i < dim; i += kEncodingThreads) x[i] = arrived[i];
  __syncthreads();

  // The window.
  const long long first_exact = at.index() * places * token_bytes;
  if (placed >= 0) {
    round_token(x, dim, rounded);
    __syncthreads();
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < places * token_bytes; i += kEncodingThreads)
    token.new_exact[first_exact + i] = i / token_bytes == placed ? rounded[i % token_bytes] : token.exact[first_exact + i];

  // The block that grows, as it was.
  const int code_bytes = of.codes * kTileTokens * kTilesOfBlock, held = min(of.patches, place), patch_bytes = patch_bytes_of(dim);
  const long long first_byte = 4ll * (static_cast<long long>(at.sequence) * layer.block_words + of.word);
  const unsigned char* before = token.open + first_byte;
  unsigned char* after = token.new_open + first_byte;
  const bool fresh = leaves && place == 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < block_bytes_of(of, dim) / 16; i += kEncodingThreads)
    reinterpret_cast<uint4*>(after)[i] = fresh ? uint4{0, 0, 0, 0} : reinterpret_cast<const uint4*>(before)[i];
  const long long first_error = static_cast<long long>(at.sequence) * layer.num_errors + of.error;
#pragma unroll 1
  for (int p = threadIdx.x; p < of.patches; p += kEncodingThreads) {
    errors[p] = p < held ? token.errors[first_error + p] : 0.0f;
    // Those of the block before stay where none is begun.
    token.new_errors[first_error + p] = leaves ? errors[p] : token.errors[first_error + p];
  }
  if (!leaves) return;

  // Into the rotated space.
  if (leaving >= 0)
#pragma unroll 1
    for (int i = threadIdx.x; i < dim; i += kEncodingThreads)
      x[i] = exact_value(token.exact + first_exact + static_cast<long long>(leaving) * token_bytes, dim, i);
  __syncthreads();
  const auto *transform = tables.at<float>(of.transform), *mean = tables.at<float>(of.mean);
  const int shares = kEncodingThreads / dim;
  if (const int column = threadIdx.x % dim, share = threadIdx.x / dim; share < shares) {
    float sum = 0;
#pragma unroll 4
    for (int i = share; i < dim; i += shares) sum += (x[i] - mean[i]) * transform[i * dim + column];
    pieces[share * dim + column] = sum;
  }
  __syncthreads();
  if (static_cast<int>(threadIdx.x) < dim) {
    float sum = 0;
#pragma unroll 1
    for (int share = 0; share < shares; ++share) sum += pieces[share * dim + threadIdx.x];
    z[threadIdx.x] = sum;
  }
  __syncthreads();
  const auto* subspaces = tables.at<EncodingSubspace>(of.subspaces);
#pragma unroll 1
  for (int subspace = warp; subspace < of.num_subspaces; subspace += kWarps)
    encode_subspace(subspaces[subspace], tables.at<float>(subspaces[subspace].table), z, tried + warp * most_width * kBeam, codes);
  __syncthreads();
#pragma unroll 1
  for (int code = threadIdx.x; code < of.codes; code += kEncodingThreads) after[code_place(of, code, place)] = codes[code];
  if (of.patches == 0) return;

  // The tokens that lose most have the patches: one that loses more takes the place of the one that loses least, of equal ones the
  // last.
  float square = 0, magnitude = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < dim; i += kEncodingThreads) square += z[i] * z[i], magnitude = fmaxf(magnitude, fabsf(z[i]));
  const float error = over_block(square, scratch, [](float a, float b) { return a + b; });
  magnitude = over_block(magnitude, scratch, [](float a, float b) { return fmaxf(a, b); });
  int patch = held;
  if (held == of.patches) {
    int least = 0;
    for (int p = 1; p < held; ++p)
      if (errors[p] <= errors[least]) least = p;
    if (error <= errors[least]) return;
#pragma unroll 1
    for (int i = threadIdx.x; i < (held - 1 - least) * patch_bytes; i += kEncodingThreads)
      after[code_bytes + least * patch_bytes + i] = before[code_bytes + (least + 1) * patch_bytes + i];
#pragma unroll 1
    for (int p = least + threadIdx.x; p < held - 1; p += kEncodingThreads) token.new_errors[first_error + p] = errors[p + 1];
    patch = held - 1;
  }
  write_patch(after + code_bytes + patch * patch_bytes, place, z, magnitude, dim, threadIdx.x, kEncodingThreads);
  if (threadIdx.x == 0) token.new_errors[first_error + patch] = error;
}

/// Many tokens: keys and values [batch, kv_heads, tokens, dim].
struct ManyTokens {
  const float *keys, *values;
  const unsigned char* exact;  // [batch, kv_heads, 2, sinks + window, exact_token_bytes]
  int tokens;
};

/// Of the tokens that queries read in 8 bits, the sinks that there are, then positions from `begin` on; and of the exact ones
/// afterwards.
struct RoundedTokens {
  float *vectors, *turned;  // [batch, kv_heads, 2, sinks + count, dim], and their keys as RoPE turns them [batch, kv_heads, …]
  unsigned char* exact;
  int sinks, begin, count;
};

// Threads of a block for one token at a time: the first `sinks` + `count` blocks write vectors, the others what is exact afterwards.
// Where nothing is exact behind the sinks (no window), vectors there are as they came.  The grid is sinks + count + places × 2 × batch
// · kv_heads, with round_floats() of shared memory.
__device__ __forceinline__ void round_tokens(const int* words, const Counts& counts, const ManyTokens& arrived,
                                             const RoundedTokens& rounded, float* shared) {
  const LayerTables& layer = *reinterpret_cast<const LayerTables*>(words);
  const int dim = layer.dim, places = layer.sinks + layer.window, token_bytes = exact_token_bytes(dim), end = counts.new_offset;
  const SideOfHead at(blockIdx.y, blockIdx.z, layer.kv_heads);
  const int vectors = rounded.sinks + rounded.count, item = blockIdx.x;
  float* x = shared;
  auto* bytes = reinterpret_cast<unsigned char*>(x + dim);
  const unsigned char* stored = arrived.exact + at.index() * places * token_bytes;
  const auto place_of = [&](int position) {
    return position < layer.sinks ? position : layer.sinks + position % max(layer.window, 1);
  };
  int position, place = -1;
  if (item < vectors) {
    position = item < rounded.sinks ? item : rounded.begin + item - rounded.sinks;
  } else {
    // Which position has that place afterwards: of a ring the last one that is there.
    place = item - vectors;
    position = place;
    if (place >= layer.sinks) {
      const int slot = place - layer.sinks;
      position = slot + (end - 1 - slot) / layer.window * layer.window;
      if (end - 1 < slot) position = -1;
      if (position < layer.sinks) position = -1;
    }
    if (position >= end) position = -1;
  }
  const bool fresh = position >= counts.offset;
  if (fresh) {
    const float* from = (at.side == 0 ? arrived.keys : arrived.values) +
                        (static_cast<long long>(blockIdx.z) * arrived.tokens + position - counts.offset) * dim;
#pragma unroll 1
    for (int i = threadIdx.x; i < dim; i += blockDim.x) x[i] = from[i];
    __syncthreads();
    round_token(x, dim, bytes);
    __syncthreads();
  }
  if (place >= 0) {
    unsigned char* to = rounded.exact + (at.index() * places + place) * token_bytes;
#pragma unroll 1
    for (int i = threadIdx.x; i < token_bytes; i += blockDim.x)
      to[i] = fresh ? bytes[i] : stored[static_cast<long long>(place) * token_bytes + i];
    return;
  }
  float* to = rounded.vectors + (at.index() * vectors + item) * dim;
  float* turned = rounded.turned + (static_cast<long long>(blockIdx.z) * vectors + item) * dim;
  const unsigned char* token = fresh ? bytes : stored + static_cast<long long>(place_of(position)) * token_bytes;
  const bool as_it_came = layer.window == 0 && position >= layer.sinks;
  const auto value = [&](int i) { return as_it_came ? x[i] : exact_value(token, dim, i); };
#pragma unroll 1
  for (int i = threadIdx.x; i < dim; i += blockDim.x) {
    const float own = value(i);
    to[i] = own;
    if (at.side != 0) continue;
    const int pair = i < layer.turned ? i : i - layer.turned;
    float turned_to = own;
    if (i < 2 * layer.turned) {
      const float other = value(i < layer.turned ? i + layer.turned : pair);
      const float2 angle = cosine_and_sine(reinterpret_cast<const unsigned*>(words + layer.turns)[pair], position);
      turned_to = layer.magnitude * (own * angle.x + (i < layer.turned ? -other : other) * angle.y);
    }
    turned[i] = turned_to;
  }
}

/// Tokens that become codes: vectors as RoundedTokens has them, the first behind the sinks is the one that leaves first.
struct EncodedTokens {
  const float* vectors;
  int stride, skipped;  // vectors of a side of a head, and before those that leave
  unsigned char* codes;  // blocks [batch, blocks, block_words]: codes, without patches
  float *rests, *errors;  // [batch, kv_heads, 2, tokens, dim] and [batch, kv_heads, 2, tokens], where a layer has patches
};

// A tile of a block, from that of the first code on.  Tokens that it held are copied from the open block.  The grid is tiles × 2 ×
// batch · kv_heads, with encode_tile_floats() of shared memory.
__device__ __forceinline__ void encode_tile(const int* words, const Counts& counts, const unsigned char* open,
                                            const EncodedTokens& tokens, int blocks, int most_width, float* shared) {
  constexpr int kWarps = kEncodingThreads / 32, kBlock = kTileTokens * kTilesOfBlock;
  const LayerCodes tables{words, nullptr, nullptr, 0, 0};
  const LayerTables& layer = tables.layer();
  const int dim = layer.dim, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const SideOfHead at(blockIdx.y, blockIdx.z, layer.kv_heads);
  const SideTables& of = tables.side(at.side, at.head);
  float *x = shared, *z = x + kTileTokens * dim, *tried = z + kTileTokens * dim;
  const int code_stride = (dim + 3) / 4 * 4, leaving = counts.new_coded - counts.coded;
  auto* codes = reinterpret_cast<unsigned char*>(tried + kWarps * most_width * kBeam);
  // Of a token of the tile its number among those that leave: negative, it was there; `leaving` and more, it is not.
  const int first = counts.coded / kBlock * kBlock + static_cast<int>(blockIdx.x) * kTileTokens - counts.coded;
  const auto comes = [&](int token) { return first + token >= 0 && first + token < leaving; };
  const auto *transform = tables.at<float>(of.transform), *mean = tables.at<float>(of.mean);
  const float* from = tokens.vectors + (at.index() * tokens.stride + tokens.skipped) * dim;
#pragma unroll 1
  for (int i = threadIdx.x; i < kTileTokens * dim; i += kEncodingThreads)
    x[i] = comes(i / dim) ? from[static_cast<long long>(first) * dim + i] - mean[i % dim] : 0.0f;
  __syncthreads();
  for (int column = lane; column < dim; column += 32) {
    constexpr int kOfWarp = kTileTokens / kWarps;
    float sums[kOfWarp] = {};
#pragma unroll 4
    for (int i = 0; i < dim; ++i) {
      const float entry = transform[i * dim + column];
#pragma unroll
#pragma unroll 1
      for (int j = 0; j < kOfWarp; ++j) sums[j] += x[(warp * kOfWarp + j) * dim + i] * entry;
    }
#pragma unroll
#pragma unroll 1
    for (int j = 0; j < kOfWarp; ++j) z[(warp * kOfWarp + j) * dim + column] = sums[j];
  }
  __syncthreads();
  const auto* subspaces = tables.at<EncodingSubspace>(of.subspaces);
#pragma unroll 1
  for (int i = warp; i < kTileTokens * of.num_subspaces; i += kWarps) {
    const int token = i / of.num_subspaces;
    const EncodingSubspace& subspace = subspaces[i % of.num_subspaces];
    if (comes(token))
      encode_subspace(subspace, tables.at<float>(subspace.table), z + token * dim, tried + warp * most_width * kBeam,
                      codes + token * code_stride);
  }
  __syncthreads();
  const int block = blockIdx.x / kTilesOfBlock, begin = blockIdx.x % kTilesOfBlock * kTileTokens;
  const unsigned char* before = open + 4ll * (static_cast<long long>(at.sequence) * layer.block_words + of.word);
  unsigned char* after =
      tokens.codes + 4ll * ((static_cast<long long>(at.sequence) * blocks + block) * layer.block_words + of.word);
#pragma unroll 1
  for (int i = threadIdx.x; i < kTileTokens * of.codes; i += kEncodingThreads) {
    const int token = i % kTileTokens, code = i / kTileTokens, place = code_place(of, code, begin + token);
    after[place] = comes(token) ? codes[token * code_stride + code] : first + token < 0 ? before[place] : 0;
  }
  if (layer.num_errors == 0) return;
#pragma unroll 1
  for (int token = warp; token < kTileTokens; token += kWarps) {
    if (!comes(token)) continue;
    const long long index = at.index() * leaving + first + token;
    float square = 0;
#pragma unroll 1
    for (int i = lane; i < dim; i += 32) {
      const float rest = z[token * dim + i];
      square += rest * rest;
      tokens.rests[index * dim + i] = rest;
    }
    for (int other = 16; other > 0; other /= 2) square += __shfl_xor_sync(~0u, square, other);
    if (lane == 0) tokens.errors[index] = square;
  }
}

/// Blocks as encode_tile left them → whole ones, with patches, and what is lost by those of the last.
struct PatchedBlocks {
  const unsigned char *codes, *open;   // [batch, blocks, block_words], [batch, block_words]
  const float *rests, *errors, *held;  // of encode_tile; of the open block, [batch, num_errors]
  unsigned char* blocks;
  float* new_errors;  // [batch, num_errors]
};

// Of a block's tokens, and of those that had patches, the ones that lose most get patches, the earlier of equal ones, in the order of
// their places.  The grid is blocks × 2 × batch · kv_heads, a block has kLookUpThreads.
__device__ __forceinline__ void patch_block(const int* words, const Counts& counts, const PatchedBlocks& b) {
  constexpr int kBlock = kTileTokens * kTilesOfBlock, kWarps = kLookUpWarps;
  __shared__ float errors[kMostPatches + kBlock];
  __shared__ short chosen[kMostPatches];
  __shared__ bool stays[kMostPatches + kBlock];
  const LayerCodes tables{words, nullptr, nullptr, 0, 0};
  const LayerTables& layer = tables.layer();
  const int dim = layer.dim, warp = threadIdx.x / 32, lane = threadIdx.x % 32, patch_bytes = patch_bytes_of(dim),
            block = blockIdx.x, num_blocks = gridDim.x, leaving = counts.new_coded - counts.coded;
  const SideOfHead at(blockIdx.y, blockIdx.z, layer.kv_heads);
  const SideTables& of = tables.side(at.side, at.head);
  const long long first_byte =
      4ll * ((static_cast<long long>(at.sequence) * num_blocks + block) * layer.block_words + of.word);
  const int code_bytes = of.codes * kBlock;
  unsigned char* to = b.blocks + first_byte;
#pragma unroll 1
  for (int i = threadIdx.x; i < code_bytes / 16; i += kLookUpThreads)
    reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(b.codes + first_byte)[i];
#pragma unroll 1
  for (int i = code_bytes + threadIdx.x; i < block_bytes_of(of, dim); i += kLookUpThreads) to[i] = 0;
  if (of.patches == 0) return;

  // Candidates in the order of their places: those held, then tokens that came.
  const int at_first = counts.coded % kBlock, held = block == 0 ? min(of.patches, at_first) : 0,
            first = block == 0 ? 0 : block * kBlock - at_first, came = min(leaving, (block + 1) * kBlock - at_first) - first,
            place = block == 0 ? at_first : 0, count = held + came, kept = min(of.patches, count);
  const long long first_error = static_cast<long long>(at.sequence) * layer.num_errors + of.error;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kLookUpThreads)
    errors[i] = i < held ? b.held[first_error + i] : b.errors[at.index() * leaving + first + i - held];
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += kLookUpThreads) {
    int ahead = 0;
    for (int other = 0; other < count; ++other) ahead += errors[other] > errors[i] || (errors[other] == errors[i] && other < i);
    stays[i] = ahead < kept;
  }
  __syncthreads();
  // A warp finds them in their order.
  if (warp == 0) {
    int found = 0;
    for (int begin = 0; begin < count; begin += 32) {
      const bool here = begin + lane < count && stays[begin + lane];
      const unsigned all = __ballot_sync(~0u, here);
      if (here) chosen[found + __popc(all & ((1u << lane) - 1))] = static_cast<short>(begin + lane);
      found += __popc(all);
    }
  }
  __syncthreads();
  const unsigned char* before =
      b.open + 4ll * (static_cast<long long>(at.sequence) * layer.block_words + of.word) + code_bytes;
#pragma unroll 1
  for (int p = warp; p < kept; p += kWarps) {
    const int i = chosen[p];
    unsigned char* patch = to + code_bytes + p * patch_bytes;
    if (i < held) {
#pragma unroll 1
      for (int j = lane; j < patch_bytes; j += 32) patch[j] = before[i * patch_bytes + j];
    } else {
      const float* rest = b.rests + (at.index() * leaving + first + i - held) * dim;
      float magnitude = 0;
#pragma unroll 1
      for (int j = lane; j < dim; j += 32) magnitude = fmaxf(magnitude, fabsf(rest[j]));
      for (int other = 16; other > 0; other /= 2) magnitude = fmaxf(magnitude, __shfl_xor_sync(~0u, magnitude, other));
      write_patch(patch, place + i - held, rest, magnitude, dim, lane, 32);
    }
  }
  if (block == num_blocks - 1)
#pragma unroll 1
    for (int p = threadIdx.x; p < of.patches; p += kLookUpThreads) b.new_errors[first_error + p] = p < kept ? errors[chosen[p]] : 0.0f;
}

}  // namespace veloxquant
