// Memory that will be read soon.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace veloxquant {

/// Asks for the bytes, without waiting: for what lies too far apart, or is read in too irregular an order, for processors to fetch
/// it by themselves.
inline void fetch(std::span<const std::uint8_t> bytes) {
  constexpr std::size_t kCacheLine = 64;
  for (std::size_t i = 0; i < bytes.size(); i += kCacheLine) __builtin_prefetch(bytes.data() + i);
}

}  // namespace veloxquant
