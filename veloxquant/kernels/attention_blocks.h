// How attention is cut into blocks, forward and backward.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <limits>

#include "veloxquant/kernels/attention.h"

namespace veloxquant {

/// Blocks whose scores (128 KiB) stay in the second-level cache beside the keys and values that they meet.
inline constexpr std::size_t kQueryBlock = 128, kKeyBlock = 256;

/// Keys and values that are read alike, far or near.  Of the keys that a query sees it reads here those from its last `oldest` on,
/// but for its last `newest`.
struct KeyPart {
  StridedView k, v;
  std::size_t first;  // row 0 of k and v is this key
  std::size_t newest, oldest;

  /// The keys that query `t` of sequence `b` reads here.
  KeyRange seen(const AttentionShape& shape, const AttentionRule& rule, std::size_t b, std::size_t t) const {
    const auto [begin, end] = visible_keys(shape, rule, b, t);
    const auto from_last = [begin = begin, end = end](std::size_t n) { return std::max(begin, end - std::min(end, n)); };
    return {from_last(oldest), from_last(newest)};
  }

  /// Those that any of `rows` queries from `first_query` on reads here.  Where the last one reads none, no other does.
  KeyRange seen(const AttentionShape& shape, const AttentionRule& rule, std::size_t b, std::size_t first_query,
                std::size_t rows) const {
    const KeyRange last = seen(shape, rule, b, first_query + rows - 1);
    return {last.begin < last.end ? seen(shape, rule, b, first_query).begin : last.end, last.end};
  }
};

/// The far part, then the near one.
inline std::array<KeyPart, 2> key_parts(const AttentionShape& shape, StridedView k, StridedView v, const NearKeys& near) {
  return {{{k, v, 0, near.window, std::numeric_limits<std::size_t>::max()},
           {near.k, near.v, shape.key_tokens - near.tokens, 0, near.window}}};
}

/// The part of keys [begin, begin + count) that is `seen`, relative to begin.
inline KeyRange seen_of_block(KeyRange seen, std::size_t begin, std::size_t count) {
  const std::size_t first = std::min(std::max(seen.begin, begin) - begin, count);
  return {first, std::max(first, std::min(std::max(seen.end, begin) - begin, count))};
}

}  // namespace veloxquant
