// The one interface of everything that stores vectors in few bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace veloxquant {

/// Encodes and decodes the vectors of one unit: the keys or values of one layer, all its KV heads or one of them.
///
/// Vectors are rows of `dim()` float32, row-major [tokens, dim], tokens of one head and sequence in order of position.  A quantizer
/// is immutable once fitted, so one object may be used from many threads.
class Quantizer {
 public:
  virtual ~Quantizer() = default;

  /// Elements of a vector.
  virtual int dim() const = 0;

  /// Tokens that share parameters and are therefore encoded together: 1, or for KIVI's keys 32.  A run whose length is not a
  /// multiple ends with a shorter group.
  virtual int token_group() const { return 1; }

  /// Bytes that encode() writes for `tokens` vectors: codes, scales, norms, everything that is stored per token.
  virtual std::size_t encoded_bytes(std::size_t tokens) const = 0;

  /// Rate: bits stored per element, encoded_bytes() · 8 / (tokens · dim) over whole token groups.
  double rate() const {
    const auto tokens =
        static_cast<std::size_t>(token_group()) * 64;  // 64: so that padding of a vector to whole bytes is seen as it is
    return 8.0 * static_cast<double>(encoded_bytes(tokens)) / (static_cast<double>(tokens) * dim());
  }

  /// vectors [tokens, dim] → encoded, encoded_bytes(tokens) bytes.  Values must be finite.
  virtual void encode(std::span<const float> vectors, std::span<std::uint8_t> encoded) const = 0;

  /// encoded, encoded_bytes(tokens) bytes → vectors [tokens, dim].
  virtual void decode(std::span<const std::uint8_t> encoded, std::span<float> vectors) const = 0;

  /// What is read back of `vectors` [tokens, dim] after storing them: decode(encode(vectors)).  `restored` may be `vectors` itself.
  void restore(std::span<const float> vectors, std::span<float> restored) const;
};

}  // namespace veloxquant
