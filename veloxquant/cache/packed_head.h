// The tokens of one KV head of one sequence: 8 bits of sinks and window, blocks of codes.
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

/// One side, keys or values.
struct PackedSide {
  ExactStore exact;
  BlockShape shape;
  OpenBlock open = {};
  std::vector<std::vector<std::uint8_t>> blocks = {};

  std::size_t nbytes() const { return exact.nbytes() + blocks.size() * shape.bytes; }

  /// Appends vectors [n, dim] as codes, the first of them the `index`-th coded token.
  void encode(const BlockCodec& codec, std::span<const float> vectors, std::size_t index);

  /// Blocks, of zeros, for so many coded tokens that are about to be read from elsewhere.
  void make_room(std::size_t coded);

  /// Cuts `coded` coded tokens back to `kept`.
  void trim(std::size_t coded, std::size_t kept);
};

struct PackedHead {
  PackedSide keys, values;
};

/// Tokens in the last block of so many coded ones.
constexpr std::size_t tokens_in_last_block(std::size_t coded) {
  return coded == 0 ? 0 : (coded - 1) % kPackedBlockTokens + 1;
}

}  // namespace veloxquant
