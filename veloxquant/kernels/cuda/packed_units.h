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
VELOXQUANT_ANYWHERE constexpr int finish_floats(int dim, int splits) {
  return kQueriesAtOnce * (dim + splits + 2 + kFinishThreads);
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

/// Numbers of a layer.
struct PackedLayout {
  int kv_heads, dim, window, sinks, block_words, num_tables, rest_columns, turned;  // num_tables: 1, where all KV heads share them
  int num_errors, most_subspaces;
};

/// Tokens of a sequence: those that are codes, and all.  They stay on the GPU, where each token that is appended counts them on.
struct PackedCounts {
  int coded, offset;
};

/// A sub-space of a side of a head, as tokens are encoded.  Its tables stand by dimension [width + 1, 256] for each stage, the last
/// row half the squared norms, huge for entries that are not there.
struct EncodingSubspace {
  int column, width, first_code, stages, table;  // table: where its first one begins, in floats
};

struct EncodingHead {
  int word, codes, patches, subspaces, error;  // of the layer's block, from which word on; of the errors, from which on
};

}  // namespace veloxquant
