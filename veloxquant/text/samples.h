// Token sequences that a model reads.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace veloxquant {

/// `count` sequences of `length` tokens each.
struct TokenBatch {
  int count, length;
  std::vector<std::int32_t> tokens;  // [count, length]

  TokenBatch(int count, int length)
      : count(count), length(length), tokens(static_cast<std::size_t>(count) * static_cast<std::size_t>(length)) {}

  std::span<std::int32_t> row(int index) {
    return std::span(tokens).subspan(static_cast<std::size_t>(index) * static_cast<std::size_t>(length),
                                     static_cast<std::size_t>(length));
  }
  std::span<const std::int32_t> row(int index) const {
    return std::span(tokens).subspan(static_cast<std::size_t>(index) * static_cast<std::size_t>(length),
                                     static_cast<std::size_t>(length));
  }
};

/// Cuts every text into windows of `length` tokens without overlap (a shorter rest is left out) and takes num_samples of them at
/// even distances over all texts.  Throws std::invalid_argument if there are fewer windows: says how many tokens there are and what
/// is possible.
TokenBatch cut_samples(const std::vector<std::vector<std::int32_t>>& texts, int num_samples, int length);

/// The first num_windows windows of one text (0: all there are).  Throws like cut_samples.
TokenBatch leading_windows(std::span<const std::int32_t> text, int num_windows, int length);

}  // namespace veloxquant
