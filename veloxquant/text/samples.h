// Token sequences that a model reads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace veloxquant {

/// Throws std::invalid_argument that says how many are possible if `count` sequences of `length` tokens hold more than 2^28.
void check_batch_size(int count, int length);

/// `count` sequences of `length` tokens each.
struct TokenBatch {
  int count, length;
  std::vector<std::int32_t> tokens;  // [count, length]

  /// All tokens 0.  Neither number may be negative.  Throws as check_batch_size() does.
  TokenBatch(int count, int length);

  std::span<std::int32_t> row(int index) { return std::span(tokens).subspan(offset(index), static_cast<std::size_t>(length)); }
  std::span<const std::int32_t> row(int index) const {
    return std::span(tokens).subspan(offset(index), static_cast<std::size_t>(length));
  }

 private:
  std::size_t offset(int index) const { return static_cast<std::size_t>(index) * static_cast<std::size_t>(length); }
};

/// Cuts every text into windows without overlap (a shorter rest is left out) and takes num_samples of them at even distances over
/// all texts: sample i is window ⌊i · windows / num_samples⌋.  A window has `length` tokens: `prefix` (TextEncoder::prefix()) and
/// as many of the text as there is room for.  Throws std::invalid_argument for numbers below 1, a length that the prefix fills, and
/// if there are fewer windows than samples: says how many tokens there are, how many are needed and what would be possible.
TokenBatch cut_samples(const std::vector<std::vector<std::int32_t>>& texts, int num_samples, int length,
                       std::span<const std::int32_t> prefix = {});

/// The first num_windows windows of one text (0: all there are, at least one).  Throws like cut_samples.
TokenBatch leading_windows(std::span<const std::int32_t> text, int num_windows, int length,
                           std::span<const std::int32_t> prefix = {});

/// The text of all sequences, one after another: their tokens without the prefix of those that begin with it.
std::vector<std::int32_t> text_of(const TokenBatch& batch, std::span<const std::int32_t> prefix);

}  // namespace veloxquant
