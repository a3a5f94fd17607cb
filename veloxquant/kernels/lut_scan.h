// Inner products with product-quantised vectors: a table of each code's products, and sums of its entries.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace veloxquant {

/// Codes of a vector that are added up exactly, at most.
inline constexpr std::size_t kMaxScanCodes = 256;

/// Tokens come in whole groups of so many.
inline constexpr std::size_t kScanGroup = 64;

/// Codes lie byte by byte, byte b of token t at b · stride + scan_place(t): sums of every fourth byte, as wide as they must be, are
/// those of neighbouring tokens.  Codes of 8 bits are a byte each, of 4 bits two, the even one low.
constexpr std::size_t scan_place(std::size_t token) {
  return token / kScanGroup * kScanGroup + token % 16 * 4 + token % kScanGroup / 16;
}

struct ScanCodes {
  const std::uint8_t* bytes;  // [bytes of a token, stride], up to whole groups
  std::size_t tokens, stride;
};

/// Inner products of one query with the centroids of each code, as this processor adds them up fastest: floats, or integers with
/// one step for all, their high and low digits apart.
struct ScanTables {
  std::size_t codes = 0;
  std::vector<float> floats;        // [codes, 256]
  std::vector<std::uint8_t> bytes;  // [codes, 2, 256 or 16], low digits first
  float step = 1, offset = 0;       // of integers: sum of products = offset + step · sum of entries
};

/// products [codes, centroids]: 256 centroids for codes of 8 bits, 16 for those of 4.  codes ≤ kMaxScanCodes.
void make_scan_tables(const float* products, std::size_t codes, std::size_t centroids, ScanTables& tables);

/// scores[t] = scale · the sum of token t's entries.  Rounding of integers: rms √(codes / 12) of a step, which is the widest
/// range of a code's products / 65535, of nibbles / 16383.  `tables` come from make_scan_tables on the same processor with as many
/// centroids.
void scan_bytes(const ScanTables& tables, const ScanCodes& codes, float scale, float* scores);
void scan_nibbles(const ScanTables& tables, const ScanCodes& codes, float scale, float* scores);

namespace reference {
/// Of the products themselves.
void scan_bytes(const float* products, std::size_t num_codes, const ScanCodes& codes, float scale, float* scores);
void scan_nibbles(const float* products, std::size_t num_codes, const ScanCodes& codes, float scale, float* scores);
}  // namespace reference

}  // namespace veloxquant
