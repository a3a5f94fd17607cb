// The tokens of one sequence in memory: 8 bits of sinks and window of each KV head, blocks of codes of all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "veloxquant/cache/block_codec.h"

namespace veloxquant {

/// 8-bit tokens of one side: the sinks, and the last `window` others in a ring, that at position p in slot p % window.
class ExactStore {
 public:
  /// `quantizer` outlives it.
  ExactStore(const Quantizer& quantizer, std::size_t window, std::size_t sinks);

  /// Tokens from position `first` on, bytes as they are encoded.
  void append(const std::uint8_t* encoded, std::size_t first, std::size_t tokens);

  /// The vector [dim] at a position.
  void read(std::size_t position, float* vector) const;

  std::size_t nbytes() const { return sinks_.size() + ring_.size(); }

  // Token after token.
  std::vector<std::uint8_t>& sinks() { return sinks_; }
  std::vector<std::uint8_t>& ring() { return ring_; }
  const std::vector<std::uint8_t>& sinks() const { return sinks_; }
  const std::vector<std::uint8_t>& ring() const { return ring_; }

 private:
  const Quantizer* quantizer_;
  std::size_t bytes_, window_;
  std::vector<std::uint8_t> sinks_, ring_;
};

/// Blocks of tokens, each with the bytes of all heads: of one head after another the keys, then the values.  One allocation a
/// block: small ones of each head would leave holes in the heap as large as a few percent of the codes.
using PackedBlocks = std::vector<std::vector<std::uint8_t>>;

/// One side, keys or values, of a head.
struct PackedSide {
  ExactStore exact;
  BlockShape shape;
  std::size_t begin;  // where its bytes of a block are
  OpenBlock open = {};

  std::size_t end() const { return begin + shape.bytes; }
  std::span<const std::uint8_t> of(const std::vector<std::uint8_t>& block) const {
    return std::span(block).subspan(begin, shape.bytes);
  }

  /// Writes vectors [n, dim] as codes into blocks that have room for them, the first of them the `index`-th coded token.
  void encode(const BlockCodec& codec, std::span<const float> vectors, std::size_t index, PackedBlocks& blocks);

  /// Cuts the last block back to `tokens` ≥ 1; it held `held`, and if it was closed is not the one that `open` is of.
  void trim(std::size_t held, std::size_t tokens, bool closed, std::vector<std::uint8_t>& block);
};

struct PackedHead {
  PackedSide keys, values;
};

/// Sinks, then `coded` tokens as codes, then those of the window.
struct PackedSequence {
  std::size_t tokens = 0, coded = 0;
  std::vector<PackedHead> heads = {};  // none before the first token
  PackedBlocks blocks = {};

  std::size_t nbytes() const;

  /// Blocks for so many coded tokens; those that come are zeros.
  void make_room(std::size_t coded);

  /// Cuts the coded tokens back to `kept`.
  void keep_coded(std::size_t kept);
};

/// Tokens in the last block of so many coded ones.
constexpr std::size_t tokens_in_last_block(std::size_t coded) {
  return coded == 0 ? 0 : (coded - 1) % kPackedBlockTokens + 1;
}

}  // namespace veloxquant
