// The tokens of heads in blocks of codes, as graphs of MLX's operations: what block_codec.h is to our CPU code.
#pragma once

#include <memory>
#include <optional>

#include "mlx/array.h"
#include "veloxquant/cache/method_graph.h"
#include "veloxquant/quantize/packed_layout.h"

namespace veloxquant {

/// Keys or values of some heads that are stored alike.  Bytes are those of BlockCodec, then zeros up to a multiple of 16, which a
/// GPU loads at a time.  Immutable.
class GraphCodec {
 public:
  /// Throws as check_packable does.
  explicit GraphCodec(const QuantizerParameters& parameters);

  int block_bytes() const { return block_bytes_; }

  /// Of these, those of BlockCodec.
  int filled_bytes() const { return filled_bytes_; }

  /// Of a block of kPackedBlockTokens tokens; 0 for methods that know none.
  int patches() const { return patches_; }

  /// Blocks, each of a row of its own.
  struct Blocks {
    mx::array bytes;   // uint8 [rows, block_bytes]
    mx::array errors;  // float32 [rows, patches]: what the tokens patched have lost, in the order of the patches, then zeros
  };

  /// Blocks that hold `at` tokens, with vectors [rows, n, dim] appended as tokens at … at + n − 1; at + n ≤ kPackedBlockTokens.
  /// What is in `blocks` does not matter where at is 0.
  Blocks append(const Blocks& blocks, int at, const mx::array& vectors) const;

  /// Blocks that hold `held` tokens, cut back to the first `tokens` ≥ 1 as trim_block does: what is lost is taken from the patches
  /// where it is not known.
  Blocks trim(const mx::array& bytes, const std::optional<mx::array>& errors, int held, int tokens) const;

  /// The first `tokens` tokens of blocks [rows, blocks, block_bytes] → [rows, tokens, dim], in a space of the codec's own, …
  mx::array look_up(const mx::array& blocks, int tokens) const;

  /// … from which sums [..., dim] by weights that add up to totals [..., 1] are brought back once.
  mx::array back(const mx::array& sums, const mx::array& totals) const;

  /// Vectors: back of look_up.
  mx::array decode(const mx::array& blocks, int tokens) const { return back(look_up(blocks, tokens), number(1)); }

 private:
  mx::array as_block(const mx::array& tokens) const;
  mx::array tokens_of(const mx::array& blocks) const;
  mx::array patches_of(const mx::array& blocks) const;
  Blocks offer_patches(const Blocks& blocks, int at, const mx::array& rest) const;

  struct Graph;
  const MethodGraph& graph() const;

  std::shared_ptr<Graph> graph_;
  int dim_, token_bytes_, patches_, filled_bytes_, block_bytes_;
  std::optional<mx::array> byte_at_place_, place_of_byte_;  // of tokens that do not stand one after another; [1, bytes of all]
};

}  // namespace veloxquant
