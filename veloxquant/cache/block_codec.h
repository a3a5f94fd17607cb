// The tokens of one head in blocks of codes, and attention over them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "veloxquant/kernels/entry_scan.h"
#include "veloxquant/kernels/lut_scan.h"
#include "veloxquant/model/rope.h"
#include "veloxquant/quantize/packed_layout.h"
#include "veloxquant/quantize/registry.h"

namespace veloxquant {

/// Where the parts of a block stand, and how large it is: codes, then (rotated_pq) patches.
struct BlockShape {
  TokenOrder order;
  std::size_t bytes, patches_at, patches, patch_bytes;
  int dim;

  std::size_t token_bytes() const { return patches_at / kPackedBlockTokens; }
  std::size_t place(std::size_t byte, std::size_t token) const { return byte_place(order, token_bytes(), byte, token); }
};

/// Throws as check_packable does.
BlockShape block_shape(const QuantizerParameters& parameters);

/// What the last block, which grows, needs beside its bytes.
struct OpenBlock {
  std::vector<float> patch_errors;  // rotated_pq: of the tokens patched, in the order of the patches
};

/// Cuts a block that holds `held` tokens back to the first `tokens` ≥ 1.  `open` is of this block, or empty.
///
/// Patches of tokens that go are gone, and those that they had displaced do not come back: patches of zeros, which any other
/// displaces, stand in their place.  What a token lost is taken from its patch where `open` does not know it.
void trim_block(const BlockShape& shape, std::size_t held, std::size_t tokens, std::uint8_t* block, OpenBlock& open);

/// The first `tokens` tokens of a block, and what BlockCodec::look_up() found for them.
struct CodedBlock {
  const std::uint8_t* bytes;
  std::size_t tokens;
  const std::uint8_t* sums = nullptr;
};

/// Queries of one KV head [num_queries, dim] at work on a block.
struct BlockQueries {
  const float* q;  // as attention has them: turned by their positions
  std::size_t num_queries;
  float scale;
};

/// What a codec makes of fewer than kManyQueries queries before it scores blocks.
struct PreparedQueries {
  std::size_t first_position, num_blocks;  // that will be scored, one after another

  std::vector<float> turned, factors;  // rotated_pq: turned back by the positions of some blocks, and what their scores are times
  std::vector<std::int16_t> wide;      // rotated_pq, Rotation::kFull: every entry times A⁻¹
  std::vector<ScanTables> tables;      // vecinfer: of each query
};

/// From here on a matrix product pays for packing its operands.
inline constexpr std::size_t kManyQueries = 12;

/// scores[r · score_stride + t] = scale · q[r]·k[t], and sums[r] += Σ_t weights[r · weight_stride + t] · v[t]; k and v `stride`
/// apart.
void score_vectors(const BlockQueries& queries, const float* k, std::size_t tokens, std::size_t stride, std::size_t dim,
                   float* scores, std::size_t score_stride);
void add_vectors(const float* weights, std::size_t num_queries, std::size_t weight_stride, const float* v, std::size_t tokens,
                 std::size_t stride, std::size_t dim, float* sums);

/// Keys or values of one KV head of one layer: how kPackedBlockTokens tokens lie in a block, and what attention does with them.
/// Immutable: one serves all caches and threads.
class BlockCodec {
 public:
  virtual ~BlockCodec() = default;

  /// Appends vectors [n, dim] as tokens at … at + n − 1 of a block; at + n ≤ kPackedBlockTokens.
  virtual void append(std::span<const float> vectors, std::size_t at, std::uint8_t* block, OpenBlock& open) const = 0;

  /// The first `tokens` tokens → vectors [tokens, dim].
  virtual void decode(const std::uint8_t* block, std::size_t tokens, float* vectors) const = 0;

  /// Brings near what look_up() reads, before the first block of many.
  virtual void fetch() const {}

  /// Looks up the codes of at most kLookUpBlocks blocks at once, for fewer than kManyQueries queries: each table is read once for
  /// all of them.  What it finds, block.sums, lasts until the thread looks up others.
  virtual void look_up(std::span<CodedBlock>) const {}

  /// Keys: what is done to queries once.
  virtual void prepare(const BlockQueries&, PreparedQueries&) const {}

  /// Keys, of a block that was looked up unless queries are many: scores[r · score_stride + t] = scale · q[r]·k[t], the first token
  /// at `position`.  `queries` are those that were prepared, or, of kManyQueries and more, some of them.
  virtual void score(const CodedBlock& block, std::size_t position, const BlockQueries& queries, const PreparedQueries& prepared,
                     float* scores, std::size_t score_stride) const;

  /// Values, of a block that may have been looked up: sums[r] += Σ_t weights[r · weight_stride + t] · v[t], sums [num_queries,
  /// dim], in a space of the codec's own, …
  virtual void add(const CodedBlock& block, const float* weights, std::size_t num_queries, std::size_t weight_stride,
                   float* sums) const;

  /// … from which they are brought back once: sums [num_queries, dim] of weights that add up to totals [num_queries].
  virtual void finish(std::span<float> sums, std::span<const float> totals) const;

 protected:
  /// rope: what turns stored keys; null for values, and for keys that are stored turned.
  BlockCodec(const QuantizerParameters& parameters, const Rope* rope)
      : dim_(static_cast<std::size_t>(parameters.dim)), shape_(block_shape(parameters)), rope_(rope) {}

  const std::size_t dim_;
  const BlockShape shape_;
  const Rope* const rope_;
};

/// Throws std::invalid_argument, naming the method, for one that groups tokens in another way (KIVI's keys).
void check_packable(const QuantizerParameters& parameters);

/// Throws as check_packable does.  `rope` outlives it.
std::shared_ptr<const BlockCodec> make_block_codec(const QuantizerParameters& parameters, const Rope* rope);

}  // namespace veloxquant
