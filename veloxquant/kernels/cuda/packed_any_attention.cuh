// Attention of one token over the codes of any plan (packed_attention.cuh is faster where it serves), and over 8-bit tokens.
//
// A block of kLookUpThreads, with attention_floats() of shared memory, takes a stretch of the tokens of one KV head for four of its queries: of the codes, or of the sinks and
// the window.  A tile of 32 tokens at a time is looked up into shared memory, scored, and added up under a running softmax.
#pragma once

#include "veloxquant/kernels/cuda/packed_look_up.cuh"

namespace veloxquant {

struct AnyAttention {
  LayerCodes codes;
  QueryRows queries;              // all heads of the sequence: q [kv_heads, rows, dim]
  const unsigned char* exact;     // [kv_heads, 2, sinks + window, exact_token_bytes]
  int offset;                     // tokens in all, that of the queries included
  int first_seen;                 // the first position that the queries see
  int splits, exact_splits;       // stretches of the codes, and of the other tokens
  AttentionParts parts;           // of the sequence: [kv_heads, splits + exact_splits, rows]
};

class AnyAttentionBlock {
 public:
  __device__ AnyAttentionBlock(const AnyAttention& a, float* shared)
      : a_(a),
        layer_(a.codes.layer()),
        dim_(layer_.dim),
        head_(blockIdx.y % layer_.kv_heads),
        first_row_(blockIdx.z * kQueriesAtOnce),
        keys_(shared),
        values_(keys_ + dim_ * kTileStride),
        q_(values_ + dim_ * kTileStride),
        scores_(q_ + kQueriesAtOnce * dim_),
        weights_(scores_ + kParts * kQueriesAtOnce * kTileTokens),
        state_(weights_ + kQueriesAtOnce * kTileTokens) {}

  __device__ void run() {
    // Those of exact tokens begin first: they are the last to end.
    const int block = static_cast<int>(blockIdx.x) - a_.exact_splits;
    const bool codes = block >= 0;
    int first, last;
    if (codes) {
      const int tiles = (a_.codes.tokens + kTileTokens - 1) / kTileTokens,
                hidden = max(0, min(a_.codes.tokens, a_.first_seen - layer_.sinks)) / kTileTokens;
      first = hidden + static_cast<int>(static_cast<long long>(tiles - hidden) * block / a_.splits);
      last = hidden + static_cast<int>(static_cast<long long>(tiles - hidden) * (block + 1) / a_.splits);
    } else {
      const int sinks = min(layer_.sinks, a_.offset), behind = max(0, a_.offset - layer_.sinks - a_.codes.tokens),
                tiles = (sinks + behind + kTileTokens - 1) / kTileTokens, split = blockIdx.x;
      first = tiles * split / a_.exact_splits, last = tiles * (split + 1) / a_.exact_splits;
    }
    begin(codes ? a_.codes.at<int>(a_.codes.side(0, head_).dims) : nullptr);
#pragma unroll 1
    for (int tile = first; tile < last; ++tile) {
      __syncthreads();
      add_tile(codes ? load_codes(tile) : load_exact(tile));
    }
    __syncthreads();
    const int rows = a_.queries.rows, part = codes ? block : a_.splits + static_cast<int>(blockIdx.x),
              at = (head_ * (a_.splits + a_.exact_splits) + part) * rows + first_row_;
#pragma unroll
    for (int i = 0; i < kQueriesAtOnce; ++i) {
      const int row = group() + i * groups();
      if (group() < groups() && row < kQueriesAtOnce && first_row_ + row < rows)
        a_.parts.sums[static_cast<long long>(at + row) * dim_ + column()] = sums_[i];
    }
    if (threadIdx.x < kQueriesAtOnce && first_row_ + static_cast<int>(threadIdx.x) < rows) {
      a_.parts.maxima[at + threadIdx.x] = state_[threadIdx.x];
      a_.parts.totals[at + threadIdx.x] = state_[kQueriesAtOnce + threadIdx.x];
    }
  }

 private:
  static constexpr int kParts = kLookUpWarps / kQueriesAtOnce;  // of the dimensions, for scores

  // Threads add up columns, in groups that share out the queries.
  __device__ int groups() const { return min(kLookUpThreads / dim_, kQueriesAtOnce); }
  __device__ int group() const { return threadIdx.x / dim_; }
  __device__ int column() const { return threadIdx.x % dim_; }

  // Queries, in the order of `dims` where there is one.
  __device__ void begin(const int* dims) {
#pragma unroll 1
    for (int i = threadIdx.x; i < kQueriesAtOnce * dim_; i += kLookUpThreads) {
      const int row = first_row_ + i / dim_, column = dims ? dims[i % dim_] : i % dim_;
      q_[i] = row < a_.queries.rows ? a_.queries.scale * a_.queries.q[(head_ * a_.queries.rows + row) * dim_ + column] : 0.0f;
    }
    if (threadIdx.x < kQueriesAtOnce) state_[threadIdx.x] = kHidden, state_[kQueriesAtOnce + threadIdx.x] = 0.0f;
#pragma unroll
    for (int i = 0; i < kQueriesAtOnce; ++i) sums_[i] = 0.0f;
  }

  // Keys and values of a tile of codes.  Whether the token of this lane is seen.
  __device__ bool load_codes(int tile) {
    const Tile keys{a_.codes, a_.codes.side(0, head_), tile}, values{a_.codes, a_.codes.side(1, head_), tile};
    const int warp = threadIdx.x / 32;
    if (keys.side.planes) {
      // Both at once.
      constexpr int kHalf = kLookUpWarps / 2;
      if (warp < kHalf)
        keys.look_up(keys_, layer_.sinks, warp, kHalf);
      else
        values.look_up(values_, 0, warp - kHalf, kHalf);
      __syncthreads();
      keys.add_patches(keys_, layer_.sinks);
    } else {
      keys.look_up(values_, layer_.sinks, warp, kLookUpWarps);
      __syncthreads();
      keys.add_patches(values_, layer_.sinks);
      __syncthreads();
      keys.multiply_back(values_, keys_, true, layer_.sinks);
      __syncthreads();
      values.look_up(values_, 0, warp, kLookUpWarps);
      __syncthreads();
    }
    values.add_patches(values_, 0);
    const int position = layer_.sinks + tile * kTileTokens + static_cast<int>(threadIdx.x) % 32;
    return position >= a_.first_seen && position < layer_.sinks + a_.codes.tokens;
  }

  // Of the sinks and the window.
  __device__ bool load_exact(int tile) {
    const int sinks = min(layer_.sinks, a_.offset), oldest = min(a_.offset, layer_.sinks + a_.codes.tokens),
              tokens = sinks + a_.offset - oldest, lane = threadIdx.x % 32, token = tile * kTileTokens + lane,
              position = token < sinks ? token : oldest + token - sinks, places = layer_.sinks + layer_.window,
              place = token < sinks ? token : layer_.sinks + position % max(layer_.window, 1), bytes = exact_token_bytes(dim_),
              turned = layer_.turned;
    const unsigned char *key = a_.exact + (static_cast<long long>(head_) * 2 * places + place) * bytes,
                        *value = key + static_cast<long long>(places) * bytes;
    const auto* turns = a_.codes.at<unsigned>(layer_.turns);
    const bool there = token < tokens, fours = dim_ % 4 == 0 && turned % 4 == 0;
    const int width = fours ? 4 : 1, pairs = turned / width, rest = (dim_ - 2 * turned) / width, items = pairs + rest + dim_ / width;
    // Pairs of keys that turn, the rest of keys, values: four neighbours at once where they can be loaded so.
#pragma unroll 1
    for (int item = threadIdx.x / 32; item < items; item += kLookUpWarps) {
      float x[4], y[4];
      if (item >= pairs + rest) {
        const int i = (item - pairs - rest) * width;
        exact_values(value, dim_, i, fours, there, x);
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (j < width) values_[(i + j) * kTileStride + lane] = x[j];
        continue;
      }
      const int i = item < pairs ? item * width : 2 * turned + (item - pairs) * width;
      exact_values(key, dim_, i, fours, there, x);
      if (item < pairs) {
        exact_values(key, dim_, i + turned, fours, there, y);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (j >= width) break;
          const float2 angle = cosine_and_sine(turns[i + j], position);
          turn_back(x[j], y[j], layer_.magnitude * angle.x, -layer_.magnitude * angle.y);
          keys_[(i + j + turned) * kTileStride + lane] = y[j];
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (j < width) keys_[(i + j) * kTileStride + lane] = x[j];
    }
    return token < tokens && position >= a_.first_seen;
  }

  // The tile whose keys and values are there: a warp has a part of the dimensions for one query, then a query's softmax, then columns.
  // seen: whether the token of this lane is.
  __device__ void add_tile(bool seen) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = warp % kQueriesAtOnce, part = warp / kQueriesAtOnce;
    __syncthreads();
    {
      float sum = 0;
      const int begin = part * dim_ / kParts, end = (part + 1) * dim_ / kParts;
#pragma unroll 8
      for (int i = begin; i < end; ++i) sum += keys_[i * kTileStride + lane] * q_[row * dim_ + i];
      scores_[(part * kQueriesAtOnce + row) * kTileTokens + lane] = sum;
    }
    __syncthreads();
    if (part == 0) {
      float score = 0;
#pragma unroll
      for (int i = 0; i < kParts; ++i) score += scores_[(i * kQueriesAtOnce + row) * kTileTokens + lane];
      if (a_.queries.soft_cap > 0) score = capped(score, a_.queries.soft_cap);
      if (!seen) score = kHidden;
      float top = score;
      for (int other = 16; other > 0; other /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, other));
      const float before = state_[row];
      top = fmaxf(top, before);
      const float weight = seen ? power_of_two(score - top) : 0.0f, shrink = power_of_two(before - top);
      float total = weight;
      for (int other = 16; other > 0; other /= 2) total += __shfl_xor_sync(~0u, total, other);
      weights_[row * kTileTokens + lane] = weight;
      __syncwarp();
      if (lane == 0) {
        state_[row] = top;
        state_[kQueriesAtOnce + row] = state_[kQueriesAtOnce + row] * shrink + total;
        state_[2 * kQueriesAtOnce + row] = shrink;
      }
    }
    __syncthreads();
    if (group() < groups()) {
      const float* values = values_ + column() * kTileStride;
#pragma unroll
      for (int i = 0; i < kQueriesAtOnce; ++i) {
        const int of = group() + i * groups();
        if (of >= kQueriesAtOnce) break;
        float sum = sums_[i] * state_[2 * kQueriesAtOnce + of];
#pragma unroll 8
        for (int token = 0; token < kTileTokens; ++token) sum += weights_[of * kTileTokens + token] * values[token];
        sums_[i] = sum;
      }
    }
  }

  const AnyAttention& a_;
  const LayerTables& layer_;
  const int dim_, head_, first_row_;
  float *keys_, *values_, *q_, *scores_, *weights_, *state_;  // state: maxima, totals, and by what the last tile shrank them
  float sums_[kQueriesAtOnce];
};

}  // namespace veloxquant
