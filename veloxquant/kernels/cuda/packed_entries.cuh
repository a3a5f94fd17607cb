// What is called from the host, one program for each of VELOXQUANT_ROUND, _ENCODE, _PATCH, _APPEND, _RESTORE, _SOFTMAX, _ATTEND, _ATTEND_FAST and
// _FINISH.  VELOXQUANT_KIND ends a kernel's name: MLX sets the shared memory of a name once.  Arguments are MLX's: arrays that are
// read, arrays that are written, numbers.
#pragma once

#include "veloxquant/kernels/cuda/packed_any_attention.cuh"
#include "veloxquant/kernels/cuda/packed_attention.cuh"
#include "veloxquant/kernels/cuda/packed_attention_end.cuh"
#include "veloxquant/kernels/cuda/packed_encoding.cuh"
#include "veloxquant/kernels/cuda/packed_restore.cuh"
#include "veloxquant/kernels/cuda/packed_softmax.cuh"

#define VELOXQUANT_JOINED(name, kind) name##_##kind
#define VELOXQUANT_NAMED(name, kind) VELOXQUANT_JOINED(name, kind)
#define VELOXQUANT_KERNEL(name, threads) \
  extern "C" __global__ void __launch_bounds__(threads) VELOXQUANT_NAMED(veloxquant_##name, VELOXQUANT_KIND)

namespace veloxquant {

extern __shared__ uint4 shared_memory[];

__device__ __forceinline__ float* shared_floats() {
  return reinterpret_cast<float*>(shared_memory);
}

// Blocks [batch, num_closed, block_words] and [batch, block_words], those of one sequence.
__device__ __forceinline__ LayerCodes codes_of(const int* tables, const unsigned char* closed, const unsigned char* open, int sequence,
                                               int num_closed, int coded) {
  const long long words = reinterpret_cast<const LayerTables*>(tables)->block_words;
  return {tables, reinterpret_cast<const unsigned*>(closed) + sequence * num_closed * words,
          reinterpret_cast<const unsigned*>(open) + sequence * words, num_closed, coded};
}

}  // namespace veloxquant

#ifdef VELOXQUANT_ROUND
VELOXQUANT_KERNEL(round, veloxquant::kRoundThreads)
(const int* tables, const float* keys, const float* values, const unsigned char* exact, float* vectors, float* turned,
 unsigned char* new_exact, int coded, int offset, int new_coded, int new_offset, int sinks, int begin, int count) {
  using namespace veloxquant;
  round_tokens(tables, {coded, offset, new_coded, new_offset}, {keys, values, exact, new_offset - offset},
               {vectors, turned, new_exact, sinks, begin, count}, shared_floats());
}
#endif

#ifdef VELOXQUANT_ENCODE
VELOXQUANT_KERNEL(encode, veloxquant::kEncodingThreads)
(const int* tables, const unsigned char* open, const float* vectors, unsigned char* codes, float* rests, float* errors, int coded,
 int offset, int new_coded, int new_offset, int stride, int skipped, int blocks, int most_width) {
  using namespace veloxquant;
  encode_tile(tables, {coded, offset, new_coded, new_offset}, open, {vectors, stride, skipped, codes, rests, errors}, blocks,
              most_width, shared_floats());
}
#endif

#ifdef VELOXQUANT_PATCH
VELOXQUANT_KERNEL(patch, veloxquant::kLookUpThreads)
(const int* tables, const unsigned char* codes, const unsigned char* open, const float* rests, const float* errors, const float* held,
 unsigned char* blocks, float* new_errors, int coded, int offset, int new_coded, int new_offset) {
  using namespace veloxquant;
  patch_block(tables, {coded, offset, new_coded, new_offset}, {codes, open, rests, errors, held, blocks, new_errors});
}
#endif

#ifdef VELOXQUANT_APPEND
VELOXQUANT_KERNEL(append, veloxquant::kEncodingThreads)
(const int* tables, const float* keys, const float* values, const unsigned char* exact, const unsigned char* open, const float* errors,
 unsigned char* new_exact, unsigned char* new_open, float* new_errors, int coded, int offset, int new_coded, int new_offset,
 int most_width) {
  using namespace veloxquant;
  encode_token(tables, {coded, offset, new_coded, new_offset},
               {keys, values, exact, open, errors, new_exact, new_open, new_errors}, most_width, shared_floats());
}
#endif

#ifdef VELOXQUANT_RESTORE
// Codes first … first + count − 1, `first` the begin of a tile, then `others` exact tokens, as round_tokens left them: keys, turned, and
// values [batch, kv_heads, count + others, dim].  The grid is tiles of either × 2 × batch · kv_heads.
VELOXQUANT_KERNEL(restore, veloxquant::kLookUpThreads)
(const int* tables, const unsigned char* closed, const unsigned char* open, const float* vectors, const float* turned, float* keys,
 float* values, int num_closed, int coded, int first, int count, int others) {
  using namespace veloxquant;
  const LayerTables& layer = *reinterpret_cast<const LayerTables*>(tables);
  const int tiles = (count + kTileTokens - 1) / kTileTokens, tile = blockIdx.x, side = blockIdx.y, head = blockIdx.z % layer.kv_heads;
  float* to = (side == 0 ? keys : values) + static_cast<long long>(blockIdx.z) * (count + others) * layer.dim;
  if (tile >= tiles) {
    const int begin = (tile - tiles) * kTileTokens * layer.dim, end = min(begin + kTileTokens * layer.dim, others * layer.dim);
    const float* from = side == 0 ? turned + static_cast<long long>(blockIdx.z) * others * layer.dim
                                  : vectors + (2ll * blockIdx.z + 1) * others * layer.dim;
    for (int i = begin + threadIdx.x; i < end; i += kLookUpThreads) to[static_cast<long long>(count) * layer.dim + i] = from[i];
    return;
  }
  const LayerCodes codes = codes_of(tables, closed, open, blockIdx.z / layer.kv_heads, num_closed, coded);
  restore_tile(codes, side, head, first / kTileTokens + tile, min(kTileTokens, count - tile * kTileTokens),
               to + static_cast<long long>(tile) * kTileTokens * layer.dim, shared_floats());
}
#endif

#ifdef VELOXQUANT_SOFTMAX
VELOXQUANT_KERNEL(softmax, veloxquant::kSoftmaxThreads)
(const float* scores, float* weights, int keys, int tokens, int first, int codes, int first_code, int sinks, int begin, int window,
 int reach, int all_see, float scale, float soft_cap) {
  using namespace veloxquant;
  softmax_of_seen(scores, weights, {codes, first_code, sinks, begin, window, reach, all_see}, keys, tokens, first, scale, soft_cap);
}
#endif

#ifdef VELOXQUANT_ATTEND
// The grid is splits + exact_splits × batch · kv_heads × rows / 4.
VELOXQUANT_KERNEL(attend, veloxquant::kLookUpThreads)
(const int* tables, const unsigned char* closed, const unsigned char* open, const unsigned char* exact, const float* q, float* maxima,
 float* totals, float* sums, int num_closed, int coded, int offset, int first_seen, int splits, int exact_splits, int rows, float scale,
 float soft_cap) {
  using namespace veloxquant;
  const LayerTables& layer = *reinterpret_cast<const LayerTables*>(tables);
  const int sequence = blockIdx.y / layer.kv_heads;
  const long long heads = static_cast<long long>(sequence) * layer.kv_heads, parts = heads * (splits + exact_splits) * rows;
  const AnyAttention of{codes_of(tables, closed, open, sequence, num_closed, coded),
                        {q + heads * rows * layer.dim, rows, layer.dim, scale, soft_cap, layer.sinks, layer.magnitude},
                        exact + heads * 2 * (layer.sinks + layer.window) * exact_token_bytes(layer.dim),
                        offset,
                        first_seen,
                        splits,
                        exact_splits,
                        {maxima + parts, totals + parts, sums + parts * layer.dim}};
  AnyAttentionBlock(of, shared_floats()).run();
}
#endif

#ifdef VELOXQUANT_ATTEND_FAST
// The grid is splits × (batch · kv_heads + blocks_of_exact) × rows / 4.
extern "C" __global__ void VELOXQUANT_NAMED(veloxquant_attend_fast, VELOXQUANT_KIND)(
    const int* tables, const unsigned char* key_tables, const int* key_units, const __half* key_rests, const unsigned char* value_tables,
    const int* value_units, const int* heads, const int* full_inverse, const float* full_mean, const int* full_columns,
    const int* full_turns, const unsigned char* closed, const unsigned char* open, const unsigned char* exact, const float* q,
    float* maxima, float* totals, float* sums, int num_closed, int coded, int offset, int sequence_heads, int rows, int num_tables,
    int rest_columns, float scale, float soft_cap) {
  using namespace veloxquant;
  const LayerTables& layer = *reinterpret_cast<const LayerTables*>(tables);
  const QueryRows queries{q, rows, layer.dim, scale, soft_cap, layer.sinks, layer.magnitude};
  const AttentionCodes codes{reinterpret_cast<const unsigned*>(closed), reinterpret_cast<const unsigned*>(open), num_closed,
                             layer.block_words, coded, layer.kv_heads};
  const AttentionTables of{key_tables, value_tables, reinterpret_cast<const KeyUnit*>(key_units),
                           reinterpret_cast<const ValueUnit*>(value_units), key_rests, reinterpret_cast<const HeadBlocks*>(heads),
                           {reinterpret_cast<const uint2*>(full_inverse), full_mean, full_columns,
                            reinterpret_cast<const unsigned*>(full_turns)},
                           num_tables, rest_columns};
  const ExactTokens of_exact{exact, layer.sinks, layer.window, coded, offset,
                             reinterpret_cast<const unsigned*>(tables + layer.turns), layer.turned};
  attend_packed<VELOXQUANT_FAST_KIND>(codes, queries, of, of_exact, sequence_heads, {maxima, totals, sums}, shared_memory);
}
#endif

#ifdef VELOXQUANT_FINISH
// The grid is batch · kv_heads × columns × rows / 4.
VELOXQUANT_KERNEL(finish, veloxquant::kFinishThreads)
(const int* tables, const float* maxima, const float* totals, const float* sums, float* out, int splits, int exact_splits, int rows) {
  using namespace veloxquant;
  const LayerCodes of{tables, nullptr, nullptr, 0, 0};
  const SideTables& values = of.side(1, blockIdx.x % of.layer().kv_heads);
  const QueryRows queries{nullptr, rows, of.layer().dim, 0, 0, 0, 1};
  finish_attention({const_cast<float*>(maxima), const_cast<float*>(totals), const_cast<float*>(sums)}, splits, exact_splits, queries,
                   of.at<float>(values.inverse), of.at<float>(values.inverse_mean), out, shared_memory);
}
#endif
