// Attention of few queries over packed codes (quantize/packed_layout.h): look-ups in shared memory, products on tensor cores.
//
// A warp takes a tile of 32 tokens.  A look-up gives the bytes of a unit: eight dimensions of a token (packed_units.h).  They
// become half precision on the way to a fragment of mma.m16n8k16, and never go through memory:
//   keys      scores[token][column] = Σ key[token][k] · q[column][k]: a lane's rows are tokens
//   values    sums[dimension][column] += Σ value[dimension][token] · weight[token][column]: a lane's rows are dimensions
// Lanes of a half warp would look up few different units, whose entries stand in few of the banks.  Therefore tokens come in two
// classes, and units of values, and of keys in planes, are taken in another order for each; each query has a column of the product
// for each class, of which only the rows of that class count.  Columns 0 to 3 are four queries with tokens of class 0, columns 4 to
// 7 the same with class 1.
#pragma once

#include "veloxquant/kernels/cuda/packed_full_keys.cuh"
#include "veloxquant/kernels/cuda/packed_plane_keys.cuh"
#include "veloxquant/kernels/cuda/packed_tiles.cuh"

namespace veloxquant {

// How keys are read: those of kDim dimensions that are no planes, 0: those that are.
template <int kUnits, int kDim, int kThreads>
struct KeysOf {
  using type = FullKeys<kUnits, kDim, kThreads>;
};
template <int kUnits, int kThreads>
struct KeysOf<kUnits, 0, kThreads> {
  using type = PlaneKeys<kUnits, kThreads>;
};

// A block of threads: a stretch of the coded tokens of one KV head, four queries.  The grid is splits × batch · kv_heads × rows /
// 4; a split has at most kTilesAtOnce tiles, and kPatchesAtOnce patches on a side.  Shared memory: Memory, then 64 · kWarps bytes
// for each code of the head that has most on both sides.  kKeyUnits a multiple of 8, kValueUnits too.  kWhole: all heads have a
// multiple of 4 codes, and both codes of a unit in one word.  kValuesHere: the tables of values are in shared memory too, where
// there is room.
template <int kKeyUnits, int kValueUnits, int kWarps, bool kWhole, bool kValuesHere, int kFullDim>
class CodeAttention {
  static constexpr int kSteps = kKeyUnits / 4, kGroups = (kValueUnits + 15) / 16, kThreads = 32 * kWarps;
  using Keys = typename KeysOf<kKeyUnits, kFullDim, kThreads>::type;

  struct Result {  // of a warp
    float maxima[8], totals[8], sums[kGroups * 16][kUnitDims][8];
  };

 public:
  struct alignas(16) Memory {
    union {
      struct {
        unsigned char keys[256][2][kKeyUnits][kUnitDims], values[kValuesHere ? 256 : 1][2][kValueUnits][kUnitDims];
      };
      Result results[kWarps];
    };
    typename Keys::Memory of_keys;
    uint4 offsets[kKeyUnits];
    KeyUnit key_units[kKeyUnits];
    ValueUnit value_units[kValueUnits];
    // Patches: of keys what they add to the scores of the queries, of values the scores of their tokens.
    alignas(16) float key_patches[kPatchesAtOnce][kQueriesAtOnce], value_patches[kPatchesAtOnce][kQueriesAtOnce];
    uchar4 patches_of_tile[kTilesAtOnce];  // within their block: of keys from x to y, of values from z to w
    unsigned char key_places[kPatchesAtOnce], value_places[kPatchesAtOnce];
    int key_codes[kKeyUnits], value_codes[kValueUnits];  // the second in the upper half
    // At the end: of each warp and class; what patches add to the sums.
    float weights[2 * kWarps][kQueriesAtOnce], tops[kQueriesAtOnce], patched[kQueriesAtOnce][kValueUnits * kUnitDims];
  };

  __device__ CodeAttention(const AttentionCodes& stored, const QueryRows& queries, const AttentionTables& tables, void* shared)
      : tokens_(stored.tokens),
        queries_(queries),
        tables_(tables),
        memory_(*static_cast<Memory*>(shared)),
        head_(blockIdx.y % stored.kv_heads) {
    const int tiles = (stored.tokens + kTileTokens - 1) / kTileTokens;
    first_tile_ = static_cast<int>(static_cast<long long>(tiles) * blockIdx.x / gridDim.x);
    last_tile_ = static_cast<int>(static_cast<long long>(tiles) * (blockIdx.x + 1) / gridDim.x);
    table_ = tables.num_heads == 1 ? 0 : head_;
    const HeadBlocks& place = tables.heads[head_];
    const long long sequence = blockIdx.y / stored.kv_heads;
    const auto side = [&](int word, int codes, int patches) {
      return HeadCodes{stored.closed + sequence * stored.num_closed * stored.block_words + word,
                       stored.open + sequence * stored.block_words + word,
                       stored.num_closed,
                       stored.block_words,
                       codes,
                       patches,
                       3 + (queries.dim + 1) / 2};
    };
    keys_ = side(place.key_word, place.key_codes, place.key_patches);
    values_ = side(place.value_word, place.value_codes, place.value_patches);
    tiles_of_all_ = static_cast<unsigned char*>(shared) + sizeof(Memory);
    tiles_ = tiles_of_all_ + warp_ * kTilesAhead * kTileTokens * (keys_.codes + values_.codes);
  }

  __device__ void run(const AttentionParts& parts) {
    load();
    place_patches();
    __syncthreads();
    of_keys_.load_queries(memory_.of_keys, memory_.key_units, group_, column_,
                          queries_.position + (first_tile_ + warp_) * kTileTokens);
    score_patches();
    wait_for_copies<0>();
    __syncthreads();
    attend();
    __syncthreads();
    hand_over(parts);
  }

 private:
  __device__ static void copy(void* to, const void* from, int bytes) {
#pragma unroll 2
    for (int i = threadIdx.x; i < bytes / 16; i += kThreads)
      copy_later(static_cast<uint4*>(to) + i, static_cast<const uint4*>(from) + i);
  }
  // Whole, of all blocks of this split, one after another.
  __device__ void copy_patches(const HeadCodes& codes, unsigned char* to) const {
    const int bytes = patch_stride(codes);
#pragma unroll 1
    for (int i = threadIdx.x; i < num_blocks() * bytes / 16; i += kThreads)
      copy_later(to + 16 * i, codes.patch(first_block() + 16 * i / bytes, 0) + 16 * i % bytes);
  }
  __device__ static int patch_stride(const HeadCodes& codes) {
    return (codes.patches * codes.patch_bytes + 15) / 16 * 16;
  }
  __device__ unsigned char* patches() const {
    return tiles_of_all_;
  }
  __device__ __half* rests() const {
    return reinterpret_cast<__half*>(patches() + num_blocks() * patch_stride(keys_));
  }

  __device__ const unsigned char* values_of_table() const {
    return tables_.values + static_cast<long long>(table_) * (kEntries * 2 * kValueUnits * kUnitDims);
  }
  // What is small is there at the end, tables are on their way.
  __device__ void load() {
    copy(memory_.key_units, tables_.key_units + table_ * kKeyUnits, sizeof(memory_.key_units));
    copy(memory_.value_units, tables_.value_units + table_ * kValueUnits, sizeof(memory_.value_units));
    if (keys_.patches > 0) {
      copy_patches(keys_, patches());
      const int halves_of_unit = kFullDim > 0 ? 0 : kUnitDims * tables_.rest_columns;
      copy(rests(), tables_.key_rests + static_cast<long long>(table_) * kKeyUnits * halves_of_unit,
           2 * kKeyUnits * halves_of_unit);
    }
    Keys::copy_tables(memory_.of_keys, tables_, table_);
    commit_copies();
    copy(memory_.keys, tables_.keys + static_cast<long long>(table_) * sizeof(memory_.keys), sizeof(memory_.keys));
    if (kValuesHere) copy(memory_.values, values_of_table(), sizeof(memory_.values));
    commit_copies();
    // What is read later, by threads that wait now.
    if (const int tile = first_tile_ + warp_; tile < last_tile_) {
      if (lane() < keys_.codes / 4) prefetch(keys_.tile(tile) + 128 * lane());
      if (lane() < values_.codes / 4) prefetch(values_.tile(tile) + 128 * lane());
    }
    if (static_cast<int>(threadIdx.x) < num_blocks() * min(1, values_.patches))
      prefetch(values_.patch(first_block() + threadIdx.x, 0));
    if (warp_ == 0)
      prefetch(queries_.q + (static_cast<long long>(blockIdx.y) * queries_.rows + first_row_) * queries_.dim +
               min(32 * lane(), queries_.dim - 1));
    wait_for_copies<1>();
    __syncthreads();
    Keys::load(memory_.of_keys, memory_.key_units, tables_, table_, queries_, blockIdx.y, first_row_, kTileTokens * kWarps);
#pragma unroll 1
    for (int unit = threadIdx.x; unit < kKeyUnits; unit += kThreads) {
      const KeyUnit& of = memory_.key_units[unit];
      memory_.offsets[unit] = *reinterpret_cast<const uint4*>(of.offsets);
      memory_.key_codes[unit] = of.codes[0] | of.codes[1] << 16;
    }
#pragma unroll 1
    for (int unit = threadIdx.x; unit < kValueUnits; unit += kThreads)
      memory_.value_codes[unit] = memory_.value_units[unit].codes[0] | memory_.value_units[unit].codes[1] << 16;
  }

  __device__ static int lane() {
    return threadIdx.x % 32;
  }
  __device__ int first_block() const {
    return first_tile_ / kTilesOfBlock;
  }
  __device__ int num_blocks() const {
    return (last_tile_ + kTilesOfBlock - 1) / kTilesOfBlock - first_block();
  }

  // Which patches are of which tile: those of a block ascend in place.
  __device__ void place_patches() {
#pragma unroll 1
    for (int i = threadIdx.x; i < num_blocks() * keys_.patches; i += kThreads) {
      const int block = i / keys_.patches, p = i % keys_.patches;
      memory_.key_places[i] = p < keys_.patches_of(first_block() + block, tokens_)
                                  ? patches()[block * patch_stride(keys_) + p * keys_.patch_bytes]
                                  : 255;
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < num_blocks() * values_.patches; i += kThreads) {
      const int block = first_block() + i / values_.patches, p = i % values_.patches;
      memory_.value_places[i] = p < values_.patches_of(block, tokens_) ? *values_.patch(block, p) : 255;
    }
    __syncthreads();
#pragma unroll 1
    for (int tile = first_tile_ + threadIdx.x; tile < last_tile_; tile += kThreads) {
      const int block = tile / kTilesOfBlock;
      const auto before = [&](const HeadCodes& codes, const unsigned char* places, int end) {
        int count = 0;
#pragma unroll 1
        for (int p = 0; p < codes.patches_of(block, tokens_); ++p)
          count += places[(block - first_block()) * codes.patches + p] < end;
        return static_cast<unsigned char>(count);
      };
      const int begin = tile % kTilesOfBlock * kTileTokens, end = begin + kTileTokens;
      memory_.patches_of_tile[tile - first_tile_] = {
          before(keys_, memory_.key_places, begin), before(keys_, memory_.key_places, end),
          before(values_, memory_.value_places, begin), before(values_, memory_.value_places, end)};
    }
  }

  // What the patches of keys add to scores: a warp takes sixteen, as rows of products.
  __device__ void score_patches() {
    const int count = num_blocks() * keys_.patches;
#pragma unroll 1
    for (int first = 16 * warp_; first < count; first += 16 * kWarps) {
      const unsigned char* of_row[2];
      unsigned positions[2];
      for (int i = 0; i < 2; ++i) {
        const int at = min(first + group_ + 8 * i, count - 1), block = at / keys_.patches;
        of_row[i] = patches() + block * patch_stride(keys_) + at % keys_.patches * keys_.patch_bytes;
        positions[i] = queries_.position + (first_block() + block) * kTilesOfBlock * kTileTokens + memory_.key_places[at];
      }
      float scores[1][4] = {};
      Keys::score_patches(memory_.of_keys, memory_.key_units, rests(), tables_.rest_columns, of_row, positions, queries_.magnitude,
                          group_, column_, scores);
      for (int i = 0; i < 2; ++i) {
        const int at = first + group_ + 8 * i;
        if (at >= count || column_ >= 2) continue;
        const float scale = patch_scale(of_row[i]);
        memory_.key_patches[at][2 * column_] = scale * scores[0][2 * i];
        memory_.key_patches[at][2 * column_ + 1] = scale * scores[0][2 * i + 1];
      }
    }
  }

  // Codes of a tile, on their way or there.
  __device__ __forceinline__ TileCodes key_codes(int stage) const {
    return {tiles_ + stage * kTileTokens * (keys_.codes + values_.codes), keys_.codes};
  }
  __device__ __forceinline__ TileCodes value_codes(int stage) const {
    return {tiles_ + stage * kTileTokens * (keys_.codes + values_.codes) + kTileTokens * keys_.codes, values_.codes};
  }
  __device__ __forceinline__ void load_tile(int tile, int stage) const {
    if (tile < last_tile_) {
      key_codes(stage).load_later(keys_.tile(tile));
      value_codes(stage).load_later(values_.tile(tile));
    }
    commit_copies();
  }

  // A unit that a lane looks up.
  __device__ __forceinline__ int value_unit(int of_group, int slot) const {
    return 16 * of_group + group_ + 8 * (slot ^ (column_ & 1));
  }

  // The bytes of a unit, of tokens first … first + 3.
  template <int kUnits>
  __device__ __forceinline__ void look_up(const TileCodes& tile, const unsigned char* tables, int unit, int codes, int first,
                                          uint2 (&sums)[4]) const {
    const int first_code = codes & 0xffff, second_code = codes >> 16;
    // An entry's place, in one operation where rows are 256 bytes: the code above the unit's place in a row.
    constexpr unsigned kRow = 2 * kUnits * kUnitDims, kPlaces = kRow == 256 ? 0x6504 : 0x4440, kShift = kRow == 256 ? 16 : 1;
    const unsigned first_place = kPlaces + kShift * (first_code & 3), second_place = kPlaces + kShift * (second_code & 3);
    const auto entry = [&](unsigned word, unsigned place, int stage) {
      const unsigned at =
          kRow == 256 ? __byte_perm(word, unit * kUnitDims, place) : __byte_perm(word, 0, place) * kRow + unit * kUnitDims;
      return *reinterpret_cast<const uint2*>(tables + stage * kUnits * kUnitDims + at);
    };
    const uint4 words = tile.words<kWhole>(first_code, first),
                second_words = kWhole || second_code >> 2 == first_code >> 2 && tile.codes - (first_code & ~3) >= 4
                                   ? words
                                   : tile.words<kWhole>(second_code, first);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint2 a = entry(part(words, i), first_place, 0), b = entry(part(second_words, i), second_place, 1);
      sums[i] = {a.x + b.x, a.y + b.y};
    }
  }

  // Of four tokens a unit's bytes as halves, without its offsets: dimensions 0 and 2, 1 and 3, 4 and 6, 5 and 7.
  __device__ __forceinline__ void look_up_keys(const TileCodes& tile, int unit, unsigned (&keys)[4][4]) const {
    uint2 sums[4];
    look_up<kKeyUnits>(tile, memory_.keys[0][0][0], unit, memory_.key_codes[unit], 4 * group_, sums);
    const uint4 offsets = memory_.offsets[unit];
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        // A byte b below 0x64 is the half 1024 + b.
        const unsigned bytes = __byte_perm(j < 2 ? sums[i].x : sums[i].y, 0x64646464, j % 2 == 0 ? 0x4240 : 0x4341);
        keys[i][j] = bits_of(__hsub2(halves(bytes), halves(part(offsets, j))));
      }
  }

  // For each patch of a tile on one side: use(index in the list, i and k of the scores) on the lanes that have its token's scores.
  template <class Use>
  __device__ __forceinline__ void for_patches(int block, int begin, int end, int patches, const unsigned char* places,
                                              Use use) const {
#pragma unroll 1
    for (int p = begin; p < end; ++p) {
      const int at = (block - first_block()) * patches + p, token = places[at] % kTileTokens;
      if (token / 4 != group_) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int k = 0; k < 4; ++k)
          if (token % 4 == 2 * i + (k >> 1)) use(at, i, k);
    }
  }

  __device__ void attend() {
    // The columns of a lane's scores.
    const int score_row = first_row_ + 2 * (column_ & 1);
    const bool of_class = class_of_row_ == column_ >> 1;
    int visible[2];
    for (int i = 0; i < 2; ++i) visible[i] = score_row + i < queries_.rows && of_class ? tokens_ : 0;
#pragma unroll
    for (int i = 0; i < kGroups; ++i)
#pragma unroll
      for (int j = 0; j < kUnitDims; ++j)
#pragma unroll
        for (int k = 0; k < 4; ++k) sums_[i][j][k] = 0;

    for (int stage = 0; stage < kTilesAhead; ++stage) load_tile(first_tile_ + warp_ + stage * kWarps, stage);
    int stage = 0;
    for (int tile = first_tile_ + warp_; tile < last_tile_; tile += kWarps, stage = (stage + 1) % kTilesAhead) {
      wait_for_copies<kTilesAhead - 1>();
      __syncwarp();
      float scores[2][4] = {};
      // Rows `group` of product i are tokens 4 · group + 2i, rows group + 8 the tokens after them.
      const TileCodes codes = key_codes(stage);
      of_keys_.score_tile(
          memory_.of_keys, [&](int unit, unsigned(&keys)[4][4]) { look_up_keys(codes, unit, keys); }, group_, column_, scores);
      const uchar4 patches = memory_.patches_of_tile[tile - first_tile_];
      for_patches(tile / kTilesOfBlock, patches.x, patches.y, keys_.patches, memory_.key_places,
                  [&](int at, int i, int k) { scores[i][k] += memory_.key_patches[at][2 * (column_ & 1) + (k & 1)]; });
      if (queries_.soft_cap > 0) {
#pragma unroll
        for (int i = 0; i < 8; ++i) scores[i / 4][i % 4] = capped(scores[i / 4][i % 4], queries_.soft_cap);
      }
      float top[2] = {kHidden, kHidden};
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          float& score = scores[i][k];
          if (tile * kTileTokens + 4 * group_ + 2 * i + (k >> 1) >= visible[k & 1]) score = kHidden;
          top[k & 1] = fmaxf(top[k & 1], score);
        }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        top[i] = fmaxf(top[i], __shfl_xor_sync(~0u, top[i], 4));
        top[i] = fmaxf(top[i], __shfl_xor_sync(~0u, top[i], 8));
        top[i] = fmaxf(top[i], __shfl_xor_sync(~0u, top[i], 16));
        top[i] = fmaxf(top[i], maximum_[i]);
      }
      if (__any_sync(~0u, top[0] > maximum_[0] || top[1] > maximum_[1])) {
        const float shrink[2] = {power_of_two(maximum_[0] - top[0]), power_of_two(maximum_[1] - top[1])};
#pragma unroll
        for (int i = 0; i < kGroups; ++i)
#pragma unroll
          for (int j = 0; j < kUnitDims; ++j)
#pragma unroll
            for (int k = 0; k < 4; ++k) sums_[i][j][k] *= shrink[k & 1];
#pragma unroll
        for (int i = 0; i < 2; ++i) total_[i] *= shrink[i], maximum_[i] = top[i];
      }
      for_patches(tile / kTilesOfBlock, patches.z, patches.w, values_.patches, memory_.value_places, [&](int at, int i, int k) {
        if (of_class) memory_.value_patches[at][2 * (column_ & 1) + (k & 1)] = scores[i][k];
      });
      unsigned weights[2][2];  // of column `group`, two tokens each
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          // Where nothing is seen yet, the maximum is that of hidden scores.
          const auto weight = [&](int k) {
            return scores[i][2 * half + k] > kHidden ? power_of_two(scores[i][2 * half + k] - maximum_[k] + kWeightShift) : 0.0f;
          };
          const __half2 own = __floats2half2_rn(weight(0), weight(1));
          // What is summed is what the product sees.
          const float2 seen = __half22float2(own);
          total_[0] += seen.x, total_[1] += seen.y;
          weights[i][half] = transposed(bits_of(own));
        }
      add_tile(value_codes(stage), weights);
      __syncwarp();
      load_tile(tile + kTilesAhead * kWarps, stage);

      // Queries go back on to the warp's next tile.
      of_keys_.turn_on(memory_.of_keys, group_, column_);
    }
  }

  // Values of a tile.
  __device__ __forceinline__ void add_tile(const TileCodes& tile, const unsigned (&weights)[2][2]) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      uint2 entries[2][2][4];  // of tokens 8·column …
#pragma unroll
      for (int slot = 0; slot < 2; ++slot)
#pragma unroll
        for (int some = 0; some < 2; ++some) {
          const int unit = value_unit(i, slot);
          if (unit >= kValueUnits) {
#pragma unroll
            for (int t = 0; t < 4; ++t) entries[slot][some][t] = {0, 0};
            continue;
          }
          look_up<kValueUnits>(tile, kValuesHere ? memory_.values[0][0][0] : values_of_table(), unit, memory_.value_codes[unit],
                               8 * column_ + 4 * some, entries[slot][some]);
        }
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int quarter = 0; quarter < 2; ++quarter) {
          // Rows 2·column and 2·column + 1 of product j are tokens 8·column + 2j and four later, eight rows on the tokens after
          // those.
          unsigned pairs[2][2][2];  // [slot][which rows][two dimensions]
#pragma unroll
          for (int slot = 0; slot < 2; ++slot)
#pragma unroll
            for (int later = 0; later < 2; ++later) {
              const uint2 a = entries[slot][0][2 * j + later], b = entries[slot][1][2 * j + later];
              pairs[slot][later][0] = __byte_perm(quarter ? a.y : a.x, quarter ? b.y : b.x, 0x5140);
              pairs[slot][later][1] = __byte_perm(quarter ? a.y : a.x, quarter ? b.y : b.x, 0x7362);
            }
#pragma unroll
          for (int dim = 0; dim < 4; ++dim) {
            const unsigned select = dim & 1 ? 0x4342 : 0x4140;
            const auto half_of = [&](int slot, int later) { return __byte_perm(pairs[slot][later][dim >> 1], 0x64646464, select); };
            multiply(sums_[i][4 * quarter + dim], half_of(0, 0), half_of(1, 0), half_of(0, 1), half_of(1, 1), weights[j][0],
                     weights[j][1]);
          }
        }
    }
  }

  // All warps and both classes together.
  __device__ void hand_over(const AttentionParts& parts) {
    Result& own = memory_.results[warp_];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      total_[i] += __shfl_xor_sync(~0u, total_[i], 4);
      total_[i] += __shfl_xor_sync(~0u, total_[i], 8);
      total_[i] += __shfl_xor_sync(~0u, total_[i], 16);
      if (group_ == 0) own.maxima[2 * column_ + i] = maximum_[i], own.totals[2 * column_ + i] = total_[i];
    }
    // Rows of columns of class 1 are those of the other slot.
#pragma unroll
    for (int i = 0; i < kGroups; ++i)
#pragma unroll
      for (int dim = 0; dim < kUnitDims; ++dim)
#pragma unroll
        for (int k = 0; k < 4; ++k)
          own.sums[16 * i + group_ + 8 * (k >> 1 ^ column_ >> 1)][dim][2 * column_ + (k & 1)] = sums_[i][dim][k];
    copy_patches(values_, patches());
    commit_copies();
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < 2 * kWarps * kQueriesAtOnce; i += kThreads) {
      const int query = i % kQueriesAtOnce;
      float top = kHidden;
      for (int other = 0; other < kWarps; ++other)
        top = fmaxf(top, fmaxf(memory_.results[other].maxima[query], memory_.results[other].maxima[query + 4]));
      memory_.tops[query] = top;
      memory_.weights[i / kQueriesAtOnce][query] =
          power_of_two(column_of(i / kQueriesAtOnce, query).maximum() - top - kWeightShift);
    }
    wait_for_copies<0>();
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < num_blocks() * values_.patches; i += kThreads) {
      const int block = i / values_.patches, p = i % values_.patches,
                tile = (first_block() + block) * kTilesOfBlock + memory_.value_places[i] / kTileTokens;
      const bool seen = tile >= first_tile_ && tile < last_tile_ && p < values_.patches_of(first_block() + block, tokens_);
      const float scale = patch_scale(patch_at(i));
      for (int query = 0; query < kQueriesAtOnce; ++query)
        memory_.value_patches[i][query] = seen ? scale * power_of_two(memory_.value_patches[i][query] - memory_.tops[query]) : 0.0f;
    }
    for (int i = threadIdx.x; i < kQueriesAtOnce * kValueUnits * kUnitDims; i += kThreads) memory_.patched[0][i] = 0;
    __syncthreads();
    if (values_.patches > 0) add_patches();
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < kQueriesAtOnce * kValueUnits * kUnitDims; i += kThreads) {
      const int query = i / (kValueUnits * kUnitDims), unit = i / kUnitDims % kValueUnits, dim = i % kUnitDims;
      const ValueUnit& of = memory_.value_units[unit];
      if (first_row_ + query >= queries_.rows || dim >= of.width) continue;
      float weights = 0, sum = 0;
      for (int other = 0; other < 2 * kWarps; ++other) {
        const Column column = column_of(other, query);
        const float weight = memory_.weights[other][query];
        weights += weight * column.total();
        sum += weight * (column.sum(unit, dim) - 1024.0f * column.total());
      }
      sum = of.scale * sum + of.low[dim] * weights + (values_.patches > 0 ? memory_.patched[query][of.column + dim] : 0.0f);
      const long long at = (static_cast<long long>(blockIdx.y) * (gridDim.x + 1) + blockIdx.x) * queries_.rows + first_row_ + query;
      parts.sums[at * queries_.dim + of.column + dim] = sum;
      if (unit == 0 && dim == 0) parts.maxima[at] = memory_.tops[query], parts.totals[at] = weights;
    }
  }

  // Threads share out pairs of columns, and the patches.
  __device__ void add_patches() {
    const int pairs = (queries_.dim + 1) / 2, shares = kThreads / pairs, share = threadIdx.x / pairs, pair = threadIdx.x % pairs;
    if (share >= shares) return;
    float sums[kQueriesAtOnce][2] = {};
#pragma unroll 2
    for (int i = share; i < num_blocks() * values_.patches; i += shares) {
      const float2 rests = __half22float2(patch_rests(patch_at(i), 2 * pair));
      const float4 weights = *reinterpret_cast<const float4*>(memory_.value_patches[i]);
      const float of_query[kQueriesAtOnce] = {weights.x, weights.y, weights.z, weights.w};
#pragma unroll
      for (int query = 0; query < kQueriesAtOnce; ++query)
        sums[query][0] += of_query[query] * rests.x, sums[query][1] += of_query[query] * rests.y;
    }
#pragma unroll
    for (int query = 0; query < kQueriesAtOnce; ++query)
      for (int i = 0; i < 2; ++i)
        if (2 * pair + i < queries_.dim) atomicAdd(&memory_.patched[query][2 * pair + i], sums[query][i]);
  }

  // A query's column of one warp and class.
  struct Column {
    const Result& result;
    int at;
    __device__ float maximum() const { return result.maxima[at]; }
    __device__ float total() const { return result.totals[at]; }
    __device__ float sum(int unit, int dim) const { return result.sums[unit][dim][at]; }
  };
  __device__ Column column_of(int warp_and_class, int query) const {
    return {memory_.results[warp_and_class / 2], query + 4 * (warp_and_class & 1)};
  }
  __device__ const unsigned char* patch_at(int i) const {
    return patches() + i / values_.patches * patch_stride(values_) + i % values_.patches * values_.patch_bytes;
  }

  const int tokens_;
  const QueryRows& queries_;
  const AttentionTables& tables_;
  Memory& memory_;
  const int head_, warp_ = threadIdx.x / 32, group_ = threadIdx.x % 32 / 4, column_ = threadIdx.x % 4,
                   first_row_ = blockIdx.z * kQueriesAtOnce;
  const int class_of_row_ = group_ >> 1 & 1;
  int first_tile_, last_tile_, table_;
  HeadCodes keys_, values_;
  unsigned char *tiles_of_all_,
      *tiles_;  // codes on their way, kTilesAhead tiles of this warp; before and after patches take their place
  Keys of_keys_;
  float maximum_[2] = {kHidden, kHidden}, total_[2] = {0, 0};  // of the columns of a lane's scores
  float sums_[kGroups][kUnitDims][4];
};

// A block of threads for each KV head and four rows, exact_floats() floats of shared memory: the part of the exact tokens, at
// `splits` of the parts.
__device__ __forceinline__ void attend_exact(const ExactTokens& exact, const QueryRows& queries, const AttentionParts& parts,
                                             int splits, int sequence_head, int first_row, void* shared) {
  const int sinks = min(exact.sinks, exact.offset), oldest = min(exact.offset, exact.sinks + exact.coded),
            tokens = sinks + exact.offset - oldest, dim = queries.dim, lane = threadIdx.x % 32;
  float* values = static_cast<float*>(shared);  // [tokens, dim]
  float* scores = values + tokens * dim;        // [tokens, kQueriesAtOnce], then weights
  const float* q = queries.q + (static_cast<long long>(sequence_head) * queries.rows + first_row) * dim;
  const int rows = min(kQueriesAtOnce, queries.rows - first_row);
  for (int token = threadIdx.x / 32; token < tokens; token += blockDim.x / 32) {
    const unsigned position = token < sinks ? token : oldest + token - sinks;
    const int place = token < sinks ? token : exact.sinks + position % exact.window;
    const unsigned char* key =
        exact.bytes + (static_cast<long long>(sequence_head) * 2 * (exact.sinks + exact.window) + place) * exact_token_bytes(dim);
    const unsigned char* value = key + static_cast<long long>(exact.sinks + exact.window) * exact_token_bytes(dim);
    float sums[kQueriesAtOnce] = {};
    const auto add = [&](float x, int i) {
#pragma unroll
      for (int row = 0; row < kQueriesAtOnce; ++row)
        if (row < rows) sums[row] += x * q[row * dim + i];
    };
    for (int i = lane; i < exact.turned; i += 32) {
      const int j = i + exact.turned;
      const float2 angle = cosine_and_sine(exact.turns[i], position);
      float x = exact_value(key, dim, i), y = exact_value(key, dim, j);
      turn_back(x, y, queries.magnitude * angle.x, -queries.magnitude * angle.y);
      add(x, i), add(y, j);
    }
    for (int i = 2 * exact.turned + lane; i < dim; i += 32) add(exact_value(key, dim, i), i);
    for (int i = lane; i < dim; i += 32) values[token * dim + i] = exact_value(value, dim, i);
#pragma unroll
    for (int row = 0; row < kQueriesAtOnce; ++row) {
#pragma unroll
      for (int other = 16; other > 0; other /= 2) sums[row] += __shfl_xor_sync(~0u, sums[row], other);
      const float score = queries.scale * sums[row];
      if (lane == 0) scores[token * kQueriesAtOnce + row] = queries.soft_cap > 0 ? capped(score, queries.soft_cap) : score;
    }
  }
  __syncthreads();
  const long long at = (static_cast<long long>(sequence_head) * (splits + 1) + splits) * queries.rows + first_row;
  if (const int row = threadIdx.x / 32; row < rows) {
    float top = kHidden, total = 0;
    for (int token = lane; token < tokens; token += 32) top = fmaxf(top, scores[token * kQueriesAtOnce + row]);
    for (int other = 16; other > 0; other /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, other));
    for (int token = lane; token < tokens; token += 32) {
      float& score = scores[token * kQueriesAtOnce + row];
      score = power_of_two(score - top);
      total += score;
    }
    for (int other = 16; other > 0; other /= 2) total += __shfl_xor_sync(~0u, total, other);
    if (lane == 0) parts.maxima[at + row] = top, parts.totals[at + row] = total;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows * dim; i += blockDim.x) {
    float sum = 0;
    for (int token = 0; token < tokens; ++token) sum += scores[token * kQueriesAtOnce + i / dim] * values[token * dim + i % dim];
    parts.sums[at * dim + i] = sum;
  }
}

// Both: blocks beyond the heads are those of the exact tokens, which the last ones of the grid run beside others.  The grid is
// splits × (batch · kv_heads + blocks_of_exact) × rows / 4.
template <int kKeyUnits, int kValueUnits, int kWarps, bool kWhole, bool kValuesHere, int kFullDim>
__device__ __forceinline__ void attend_packed(const AttentionCodes& stored, const QueryRows& queries, const AttentionTables& tables,
                                              const ExactTokens& exact, int sequence_heads, const AttentionParts& parts,
                                              void* shared) {
  if (static_cast<int>(blockIdx.y) < sequence_heads)
    return CodeAttention<kKeyUnits, kValueUnits, kWarps, kWhole, kValuesHere, kFullDim>(stored, queries, tables, shared).run(parts);
  const int of_exact = (blockIdx.y - sequence_heads) * gridDim.x + blockIdx.x;
  if (of_exact < sequence_heads) attend_exact(exact, queries, parts, gridDim.x, of_exact, blockIdx.z * kQueriesAtOnce, shared);
}

}  // namespace veloxquant
