// How attention is cut into blocks, forward and backward.
#pragma once

#include <algorithm>
#include <cstddef>

#include "veloxquant/kernels/attention.h"

namespace veloxquant {

/// Blocks whose scores (128 KiB) stay in the second-level cache beside the keys and values that they meet.
inline constexpr std::size_t kQueryBlock = 128, kKeyBlock = 256;

/// The part of keys [begin, begin + count) that is `seen`, relative to begin.
inline KeyRange seen_of_block(KeyRange seen, std::size_t begin, std::size_t count) {
  const std::size_t first = std::min(std::max(seen.begin, begin) - begin, count);
  return {first, std::max(first, std::min(std::max(seen.end, begin) - begin, count))};
}

}  // namespace veloxquant
