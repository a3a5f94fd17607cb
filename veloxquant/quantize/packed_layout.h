// How the codes of a unit lie in memory while a cache is in use: one definition for CPU, GPU and files.
#pragma once

#include <concepts>
#include <cstddef>

#include "veloxquant/kernels/lut_scan.h"
#include "veloxquant/kernels/packed_lookup.h"

namespace veloxquant {

/// Memory of a cache grows by so many tokens; the blocks of rotated_pq, which share patches, are as long.
inline constexpr std::size_t kPackedBlockTokens = 256;

/// That so many coded tokens stand in, the last filled or not.
template <std::integral Count>
constexpr Count blocks_of(Count coded) {
  constexpr Count kTokens = kPackedBlockTokens;
  return (coded + kTokens - 1) / kTokens;
}

/// Tokens of a tile, within a block.
inline constexpr std::size_t kPackedTileTokens = 32;

/// Where the 8-bit codes of a block stand.  Tile after tile; in a tile the first four codes of every token, then the next four, …,
/// and last the one to three that remain: a scan over tokens reads forward, and on a GPU neighbouring threads read neighbouring
/// words.
struct PackedCodes {
  std::size_t codes;  // of a token

  constexpr CodePlace place(std::size_t code) const {
    const std::size_t word = code / 4, rest = codes - 4 * word, bytes = rest < 4 ? rest : 4;
    return {word * 4 * kPackedTileTokens + code % 4, bytes};
  }

  constexpr std::size_t tile_bytes() const { return codes * kPackedTileTokens; }
  constexpr std::size_t block_bytes() const { return codes * kPackedBlockTokens; }
};

/// How the encoded tokens of a block stand.
enum class TokenOrder {
  kPlain,  // token after token
  kTiles,  // as PackedCodes
  kScan,   // byte after byte, tokens as scan_place has them
};

/// Of a byte of a token of `token_bytes`, in its block.
constexpr std::size_t byte_place(TokenOrder order, std::size_t token_bytes, std::size_t byte, std::size_t token) {
  if (order == TokenOrder::kPlain) return token * token_bytes + byte;
  if (order == TokenOrder::kScan) return byte * kPackedBlockTokens + scan_place(token);
  const PackedCodes codes{token_bytes};
  const auto [offset, stride] = codes.place(byte);
  return token / kPackedTileTokens * codes.tile_bytes() + offset + token % kPackedTileTokens * stride;
}

}  // namespace veloxquant
