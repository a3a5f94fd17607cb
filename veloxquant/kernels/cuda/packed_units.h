// What the kernels of packed caches and those who call them agree on: how work is shared out, and what is read beside the codes.
#pragma once

#ifdef __CUDACC__
#define VELOXQUANT_ANYWHERE __host__ __device__
#else
#define VELOXQUANT_ANYWHERE
#endif

namespace veloxquant {

constexpr int kTileTokens = 32, kTilesOfBlock = 8, kUnitDims = 8, kEntries = 256;
constexpr int kExactGroup = 64;  // dimensions of an 8-bit token with a scale of their own
constexpr int kBeam = 8;         // entries of the first of two tables that pairs are sought from
constexpr float kPatchCentre = 7.5f;

/// At most: of a block of threads that attends, tiles and patches on a side; of a unit's sub-space, dimensions; of a block,
/// patches.
constexpr int kTilesAtOnce = 512, kPatchesAtOnce = 256, kMostWidth = 32, kMostPatches = 64;

/// What kernels of any plan serve at most: dimensions of a head (even), and of a sub-space.
constexpr int kMostDim = 256, kMostSubspace = 128;

/// Query heads that are handled together; tiles that are on their way while one is handled.
constexpr int kQueriesAtOnce = 4, kTilesAhead = 2;

constexpr int kFinishThreads = 256, kColumnsAtOnce = 32, kEncodingThreads = 512;

/// Blocks of threads, in rows of `splits`, for the exact tokens of each KV head.
VELOXQUANT_ANYWHERE constexpr int blocks_of_exact(int sequence_heads, int splits) {
  return (sequence_heads + splits - 1) / splits;
}

/// Floats of shared memory: for exact tokens, and to put parts together.
VELOXQUANT_ANYWHERE constexpr int exact_floats(int dim, int tokens) {
  return tokens * (dim + kQueriesAtOnce);
}
VELOXQUANT_ANYWHERE constexpr int finish_floats(int dim, int parts) {
  return kQueriesAtOnce * (dim + parts + 1 + kFinishThreads);
}

/// Kernels of any plan: threads that look a tile up, that round a token, and of a row of weights; floats between columns of a tile in shared memory, one
/// more than its tokens, so that neither lanes of tokens nor lanes of columns share banks; parts that attention is cut into, at most.
constexpr int kLookUpThreads = 512, kRoundThreads = 128, kSoftmaxThreads = 256, kTileStride = kTileTokens + 1, kMostParts = 1024;

/// Floats of shared memory: to attend to a tile, to restore it, to round a token, to encode one, and to encode a tile, with sub-spaces
/// of up to so many dimensions.
VELOXQUANT_ANYWHERE constexpr int attention_floats(int dim) {
  return 2 * dim * kTileStride + kQueriesAtOnce * (dim + 5 * kTileTokens + 4);
}
VELOXQUANT_ANYWHERE constexpr int restore_floats(int dim) {
  return 2 * dim * kTileStride;
}
VELOXQUANT_ANYWHERE constexpr int round_floats(int dim) {
  return 2 * dim + 8;
}
VELOXQUANT_ANYWHERE constexpr int encode_token_floats(int dim, int most_width) {
  return 2 * dim + kEncodingThreads + kEncodingThreads / 32 * (most_width * kBeam + 1) + kMostPatches + (2 * dim + 16 + 3) / 4 +
         (dim + 3) / 4;
}
VELOXQUANT_ANYWHERE constexpr int encode_tile_floats(int dim, int most_width) {
  return 2 * kTileTokens * dim + kEncodingThreads / 32 * most_width * kBeam + kTileTokens * ((dim + 3) / 4);
}

/// Eight dimensions of a key that one entry of each of two tables makes up: four planes that RoPE turns, as (x, y) after one
/// another. Entries are bytes: dimension i is scale · (first + second − offset), the sum of the bytes at most 255.
struct alignas(16) KeyUnit {
  unsigned short offsets[8];  // IEEE half, 1024 + offset: x of planes 0 and 1, y of both, x of planes 2 and 3, y of both
  int codes[2];               // which of a token's codes; twice the same one, and a second table of zeros, where there is one table
  float scale;
  int rest_begin, rest_count;  // columns of the rotated space that patches of it are made of, …
  unsigned turns[4];           // a plane turns by turns / 2³² of a circle a position
  int columns[8];              // of the query; −1: none
};

/// Eight dimensions of a value, from `column` of the rotated space on: scale · (first + second) + low.
struct alignas(16) ValueUnit {
  int codes[2];
  float scale;
  int column, width;
  float low[8];
};

/// Where the blocks of a KV head begin within a block of its layer, in words of 4 bytes, and what is in them.
struct HeadBlocks {
  int key_word, key_codes, key_patches, value_word, value_codes, value_patches;
};

/// A sub-space of a side of a head, as tokens are encoded.  Its tables stand by dimension [width + 1, 256] for each stage, the last
/// row half the squared norms, huge for entries that are not there.
struct EncodingSubspace {
  int column, width, first_code, stages, table;  // table: where its first one begins, in floats
};

/// Eight columns at most that an entry of one table, or the sum of one of each of two, makes up, from `column` on: of values and of
/// keys that are no planes of the rotated space, of others dimensions of a key in the order of LayerTables.  Entries are bytes, and
/// then scale · (first + second) + low, or floats of one table.
struct alignas(16) TableUnit {
  int codes[2];  // which of a token's codes; twice the same one, and a second table of zeros, where there is one table
  float scale;
  int column, width, unused[3];
  float low[8];
};

/// How the codes of tokens stand in their block: as PackedCodes or scan_place in quantize/ have them.
enum class CodeOrder : int { kTiles, kScan };

/// One side of one KV head.  Places are in words of the layer's tables.
struct SideTables {
  int word, codes, patches, error;          // of the layer's block, from which word on; of the errors, from which on
  CodeOrder order;
  int float_entries;                        // 0: bytes [256, 2, units, 8], else floats [256, units, 8]
  int num_units, units, entries;            // TableUnit
  int num_subspaces, subspaces;             // EncodingSubspace, to encode
  int transform, mean;                      // A and μ, [dim, dim] and [dim]
  int inverse, inverse_mean;                // A⁻¹ and μ; of keys with columns in the order of `dims`
  int planes;                               // keys whose units are dimensions, with A⁻¹ and μ in them
  int dims, turns;                          // keys: of each column its dimension, [dim]; of each two their RoPE, [dim / 2]
};

/// What all kernels of a layer read, at the begin of an array of words.
struct LayerTables {
  int kv_heads, dim, window, sinks, block_words, num_errors;
  int sides;           // SideTables [2, kv_heads], of keys and of values
  int turned, turns;   // dimensions i and i + turned of keys are turned by turns[i]; 0 where keys are stored turned
  float magnitude;     // of turned keys
};

}  // namespace veloxquant
