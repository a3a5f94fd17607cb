#include "veloxquant/kernels/entry_scan.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "veloxquant/kernels/entry_scan.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace veloxquant {
namespace HWY_NAMESPACE {

#if HWY_TARGET == HWY_SCALAR

using reference::add_entries;
using reference::round_rows;
using reference::score_wide;
using reference::sum_wide_entries;
using reference::turn_rows;

void score_entries(const BlockOfTiles& block, std::span<const EntryColumns> groups, const KeyGrid& grid,
                   const TurnedQueries& queries, std::uint8_t*, float* scores, std::size_t score_stride) {
  reference::score_entries(block, groups, grid, queries, scores, score_stride);
}

#else

namespace hn = hwy::HWY_NAMESPACE;

// 16 columns in one vector, or in two where vectors are shorter: wider ones would need more entries put together.
using D16 = hn::CappedTag<std::int16_t, kTurnPlanes>;
using V16 = hn::Vec<D16>;
using D32 = hn::RepartitionToWide<D16>;
using V32 = hn::Vec<D32>;
using DF = hn::RebindToFloat<D32>;
using D8 = hn::FixedTag<std::uint8_t, 16>;
using V8 = hn::Vec<D8>;
constexpr std::size_t kLanes = HWY_MIN(kTurnPlanes, HWY_LANES(std::int16_t)), kVectors = kTurnPlanes / kLanes;

// Sums at once, that the registers hold beside what they are made of.
constexpr std::size_t kSums = HWY_TARGET <= HWY_AVX3 ? 16 : 8;

void turn_rows(const float* x, std::size_t rows, std::size_t count, const float* angles, float* to) {
  const DF d;
  const std::size_t lanes = hn::Lanes(d);
  for (std::size_t row = 0; row < rows; ++row, angles += kTurnColumns)
    for (std::size_t r = 0; r < count; ++r, x += kTurnColumns, to += kTurnColumns)
      for (std::size_t i = 0; i < kTurnPlanes; i += lanes) {
        const auto a = hn::LoadU(d, x + i), b = hn::LoadU(d, x + kTurnPlanes + i), c = hn::LoadU(d, angles + i),
                   s = hn::LoadU(d, angles + kTurnPlanes + i);
        hn::StoreU(hn::NegMulAdd(b, s, hn::Mul(a, c)), d, to + i);
        hn::StoreU(hn::MulAdd(a, s, hn::Mul(b, c)), d, to + kTurnPlanes + i);
      }
}

void round_rows(const float* x, std::size_t count, std::int16_t* to) {
  const DF d;
  const hn::Rebind<std::int16_t, DF> narrow;
  for (std::size_t i = 0; i < count; i += hn::Lanes(d))
    hn::StoreU(hn::DemoteTo(narrow, hn::NearestInt(hn::LoadU(d, x + i))), narrow, to + i);
}

// Bytes as they are, in 16 bits: the `part`-th vector of them.
HWY_INLINE V16 widened(V8 bytes, std::size_t part) {
  const D16 d;
#if HWY_TARGET <= HWY_AVX2
  (void)part;
  return hn::PromoteTo(d, bytes);
#else
  const hn::Half<D8> half;
  return hn::PromoteTo(d, part == 0 ? hn::LowerHalf(half, bytes) : hn::UpperHalf(half, bytes));
#endif
}

// Lane i: the sum of a·b over lanes 2i and 2i + 1.
HWY_INLINE V32 pair_products(V16 a, V16 b) {
  const D32 d;
  V32 more = hn::Zero(d);
  const V32 some = hn::ReorderWidenMulAccumulate(d, a, b, hn::Zero(d), more);
  return hn::RearrangeToOddPlusEven(some, more);
}

// Sums of bytes of one group of columns.  kStride: of both codes where that is known when this is compiled, else 0.
template <std::size_t kStride>
struct Entries {
  const std::uint8_t *first, *second, *first_table, *second_table;
  std::size_t first_stride, second_stride;

  HWY_INLINE Entries(const std::uint8_t* tile, std::size_t token, const EntryColumns& columns)
      : first_table(columns.tables[0]),
        second_table(columns.tables[1]),
        first_stride(kStride > 0 ? kStride : columns.codes[0].stride),
        second_stride(kStride > 0 ? kStride : columns.codes[1].stride) {
    first = tile + columns.codes[0].offset + token * first_stride;
    second = tile + columns.codes[1].offset + token * second_stride;
  }

  // In the lower half of a vector; the upper one is of other entries.
  HWY_INLINE V8 load(std::size_t t) const {
    const D8 d;
    return hn::Add(hn::LoadU(d, first_table + first[t * first_stride] * kEntryColumns),
                   hn::LoadU(d, second_table + second[t * second_stride] * kEntryColumns));
  }
};

constexpr std::size_t kUsualStride = 4;

// Groups before the first whose codes lie otherwise, `together` at a time: only the last word of a token is shorter.
std::size_t count_usual(std::span<const EntryColumns> groups, std::size_t together) {
  std::size_t usual = 0;
  while (usual < groups.size() && groups[usual].codes[0].stride == kUsualStride && groups[usual].codes[1].stride == kUsualStride)
    ++usual;
  return usual / together * together;
}

// Keys as sums of bytes, and as whole numbers: those of a token from `at` on, the i-th vector of 16 planes' first (half 0) or
// second dimensions.
struct ByteKeys {
  const std::uint8_t* at;
  const std::int16_t* offsets;
  int shift;

  HWY_INLINE V16 load(std::size_t t, std::size_t half, std::size_t i) const {
    const D16 d;
    const hn::Rebind<std::uint8_t, D16> d8;
    const std::size_t column = half * kTurnPlanes + i * kLanes;
    return hn::Sub(hn::ShiftLeftSame(hn::PromoteTo(d, hn::LoadU(d8, at + t * kTurnColumns + column)), shift),
                   hn::LoadU(d, offsets + column));
  }
};

struct WideKeys {
  const std::int16_t* at;
  std::size_t stride;

  HWY_INLINE V16 load(std::size_t t, std::size_t half, std::size_t i) const {
    return hn::LoadU(D16(), at + t * stride + half * kTurnPlanes + i * kLanes);
  }
};

// Of four vectors: the sums of their lanes, or of those of each half of them.
HWY_INLINE V32 add_four(const V32* x) {
  const D32 d;
  const hn::Repartition<std::int64_t, D32> pairs;
  const auto lanes = [&](V32 a, V32 b) HWY_ATTR {
    return hn::BitCast(pairs, hn::Add(hn::InterleaveLower(d, a, b), hn::InterleaveUpper(d, a, b)));
  };
  const auto a = lanes(x[0], x[1]), b = lanes(x[2], x[3]);
  return hn::Add(hn::BitCast(d, hn::InterleaveLower(pairs, a, b)), hn::BitCast(d, hn::InterleaveUpper(pairs, a, b)));
}

// out[i] = the sum of the lanes of sums[i]; kCount is a multiple of 4.
template <std::size_t kCount>
HWY_INLINE void add_lanes(const V32* sums, float* out) {
  const hn::FixedTag<std::int32_t, 4> d;
  const hn::FixedTag<float, 4> df;
  for (std::size_t i = 0; i < kCount; i += 4) {
    const V32 four = add_four(sums + i);
#if HWY_TARGET <= HWY_AVX2
    hn::StoreU(hn::ConvertTo(df, hn::Add(hn::LowerHalf(d, four), hn::UpperHalf(d, four))), df, out + i);
#else
    hn::StoreU(hn::ConvertTo(df, four), df, out + i);
#endif
  }
}

// kQueries queries from `first` on, kTokens tokens at once.  keys_of(row, t): those of a row of columns from token t on.
template <std::size_t kQueries, class KeysOf>
HWY_INLINE void score_some(std::size_t tokens, std::size_t rows, const std::int16_t* all_angles, const TurnedQueries& queries,
                           std::size_t first, float* scores, std::size_t score_stride, const KeysOf& keys_of) {
  constexpr std::size_t kTokens = HWY_MIN(HWY_MAX(kSums / kQueries, 1), 4), kCount = (kTokens * kQueries + 3) / 4 * 4;
  const D16 d16;
  const D32 d32;
  const std::size_t row_queries = queries.num_queries * kTurnColumns;
  for (std::size_t t = 0; t < tokens; t += kTokens) {
    const std::int16_t* q = queries.q + t / kTurnedTokens * rows * row_queries + first * kTurnColumns;
    const std::int16_t* angles = all_angles + t % kTurnedTokens * kTurnColumns;
    V32 sums[kCount];
    for (auto& sum : sums) sum = hn::Zero(d32);
    for (std::size_t row = 0; row < rows; ++row, q += row_queries, angles += kTurnedTokens * kTurnColumns) {
      const auto keys = keys_of(row, t);
      for (std::size_t i = 0; i < kVectors; ++i)
        for (std::size_t token = 0; token < kTokens; ++token) {
          const std::int16_t* of_token = angles + token * kTurnColumns + i * kLanes;
          const V16 a = keys.load(token, 0, i), b = keys.load(token, 1, i), c = hn::LoadU(d16, of_token),
                    s = hn::LoadU(d16, of_token + kTurnPlanes);
          const V16 x = hn::Sub(hn::MulFixedPoint15(a, c), hn::MulFixedPoint15(b, s)),
                    y = hn::Add(hn::MulFixedPoint15(b, c), hn::MulFixedPoint15(a, s));
          for (std::size_t r = 0; r < kQueries; ++r) {
            const std::int16_t* of_query = q + r * kTurnColumns + i * kLanes;
            V32& sum = sums[r * kTokens + token];
            sum = hn::Add(sum, pair_products(x, hn::LoadU(d16, of_query)));
            sum = hn::Add(sum, pair_products(y, hn::LoadU(d16, of_query + kTurnPlanes)));
          }
        }
    }
    const std::size_t some = std::min(kTokens, tokens - t);
    float out[kCount];
    add_lanes<kCount>(sums, out);
    for (std::size_t r = 0; r < kQueries; ++r)
      for (std::size_t i = 0; i < some; ++i)
        scores[(first + r) * score_stride + t + i] = queries.factors[first + r] * out[r * kTokens + i];
  }
}

template <class KeysOf>
HWY_INLINE void score_all(std::size_t tokens, std::size_t rows, const std::int16_t* angles, const TurnedQueries& queries,
                          float* scores, std::size_t score_stride, const KeysOf& keys_of) {
  std::size_t r = 0;
  for (; r + 4 <= queries.num_queries; r += 4) score_some<4>(tokens, rows, angles, queries, r, scores, score_stride, keys_of);
  switch (queries.num_queries - r) {
    case 3:
      return score_some<3>(tokens, rows, angles, queries, r, scores, score_stride, keys_of);
    case 2:
      return score_some<2>(tokens, rows, angles, queries, r, scores, score_stride, keys_of);
    case 1:
      return score_some<1>(tokens, rows, angles, queries, r, scores, score_stride, keys_of);
  }
}

// bytes [tokens, kTurnColumns] = the sums of four groups; whole tiles are written.
template <std::size_t kStride>
void look_up_row(const BlockOfTiles& block, const EntryColumns* groups, std::uint8_t* bytes) {
  const D8 d;
  const hn::Repartition<std::uint32_t, D8> quarters;
  const hn::Repartition<std::uint64_t, D8> halves;
  const std::size_t tile_tokens = block.tile_tokens;
  for (std::size_t begin = 0; begin < block.tokens; begin += tile_tokens) {
    const std::uint8_t* tile = block.bytes + begin / tile_tokens * block.tile_bytes;
    const Entries<kStride> first(tile, 0, groups[0]), second(tile, 0, groups[1]), third(tile, 0, groups[2]),
        fourth(tile, 0, groups[3]);
    for (std::size_t t = 0; t < tile_tokens; ++t, bytes += kTurnColumns) {
      const auto pair = [&](const Entries<kStride>& a, const Entries<kStride>& b) HWY_ATTR {
        return hn::BitCast(halves,
                           hn::InterleaveLower(quarters, hn::BitCast(quarters, a.load(t)), hn::BitCast(quarters, b.load(t))));
      };
      const auto low = pair(first, second), high = pair(third, fourth);
      hn::StoreU(hn::BitCast(d, hn::InterleaveLower(halves, low, high)), d, bytes);
      hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(halves, low, high)), d, bytes + kTurnPlanes);
    }
  }
}

void score_entries(const BlockOfTiles& block, std::span<const EntryColumns> groups, const KeyGrid& grid,
                   const TurnedQueries& queries, std::uint8_t* bytes, float* scores, std::size_t score_stride) {
  // Four groups at a time: their tables, and no others, stay in the first-level cache.
  constexpr std::size_t kRowBytes = kMostTokens * kTurnColumns;
  const std::size_t usual = count_usual(groups, kTurnGroups);
  std::size_t g = 0;
  for (; g < usual; g += kTurnGroups) look_up_row<kUsualStride>(block, &groups[g], bytes + g / kTurnGroups * kRowBytes);
  for (; g < groups.size(); g += kTurnGroups) look_up_row<0>(block, &groups[g], bytes + g / kTurnGroups * kRowBytes);
  score_all(block.tokens, groups.size() / kTurnGroups, grid.angles, queries, scores, score_stride,
            [&](std::size_t row, std::size_t t) HWY_ATTR {
              return ByteKeys{bytes + row * kRowBytes + t * kTurnColumns, grid.offsets + row * kTurnColumns, grid.shift};
            });
}

void score_wide(const std::int16_t* keys, std::size_t tokens, std::size_t rows, const KeyGrid& grid, const TurnedQueries& queries,
                float* scores, std::size_t score_stride) {
  const std::size_t stride = rows * kTurnColumns;
  score_all(tokens, rows, grid.angles, queries, scores, score_stride, [&](std::size_t row, std::size_t t) HWY_ATTR {
    return WideKeys{keys + t * stride + row * kTurnColumns, stride};
  });
}

void sum_wide_entries(const BlockOfTiles& block, std::span<const CodePlace> codes, const std::int16_t* tables, std::size_t rows,
                      std::int16_t* keys) {
  const D16 d;
  constexpr std::size_t kWide = kTurnColumns / kLanes;
  // A row of columns after the other: its tables stay in the second-level cache.
  for (std::size_t row = 0; row < rows; ++row, tables += codes.size() * 256 * kTurnColumns) {
    std::int16_t* to = keys + row * kTurnColumns;
    for (std::size_t t = 0; t < block.tokens; ++t, to += rows * kTurnColumns) {
      const std::uint8_t* tile = block.bytes + t / block.tile_tokens * block.tile_bytes;
      const std::size_t in_tile = t % block.tile_tokens;
      V16 sums[kWide];
      for (auto& sum : sums) sum = hn::Zero(d);
      const std::int16_t* table = tables;
      for (const auto& [offset, stride] : codes) {
        const std::int16_t* entry = table + tile[offset + in_tile * stride] * kTurnColumns;
        for (std::size_t i = 0; i < kWide; ++i) sums[i] = hn::Add(sums[i], hn::LoadU(d, entry + i * kLanes));
        table += 256 * kTurnColumns;
      }
      for (std::size_t i = 0; i < kWide; ++i) hn::StoreU(sums[i], d, to + i * kLanes);
    }
  }
}

// Two groups of all tokens at once: their sums stay in registers, and weights are loaded once for them.  weights [pairs of
// tokens, kQueries]: of two tokens beside each other.
template <std::size_t kQueries, std::size_t kStride>
void add_groups(const BlockOfTiles& block, const EntryColumns* groups, const std::int32_t* weights, const float* factors,
                std::size_t sum_stride, float* out) {
  const D8 d8;
  const D16 d16;
  const D32 d32;
  V32 sums[kVectors][2][kQueries];
  for (auto& of_vector : sums)
    for (auto& of_group : of_vector)
      for (auto& sum : of_group) sum = hn::Zero(d32);
  for (std::size_t begin = 0; begin < block.tokens; begin += block.tile_tokens) {
    const std::uint8_t* tile = block.bytes + begin / block.tile_tokens * block.tile_bytes;
    const std::size_t some = std::min(block.tile_tokens, block.tokens - begin);
    const Entries<kStride> first(tile, 0, groups[0]), second(tile, 0, groups[1]);
    const std::int32_t* at = weights + begin / 2 * kQueries;
    // The last token of an odd number has a neighbour of weight 0, within the tile.
    for (std::size_t t = 0; t < some; t += 2, at += kQueries) {
      const V8 bytes[2] = {hn::InterleaveLower(d8, first.load(t), first.load(t + 1)),
                           hn::InterleaveLower(d8, second.load(t), second.load(t + 1))};
      for (std::size_t r = 0; r < kQueries; ++r) {
        const V16 weight = hn::BitCast(d16, hn::Set(d32, at[r]));
        for (std::size_t g = 0; g < 2; ++g)
          for (std::size_t i = 0; i < kVectors; ++i)
            sums[i][g][r] = hn::Add(sums[i][g][r], pair_products(widened(bytes[g], i), weight));
      }
    }
  }
  const DF df;
  for (std::size_t i = 0; i < kVectors; ++i)
    for (std::size_t g = 0; g < 2; ++g)
      for (std::size_t r = 0; r < kQueries; ++r) {
        float* to = out + r * sum_stride + g * kEntryColumns + i * hn::Lanes(df);
        hn::StoreU(hn::MulAdd(hn::Set(df, factors[r]), hn::ConvertTo(df, sums[i][g][r]), hn::LoadU(df, to)), df, to);
      }
}

// to [count] = x [count] in steps of 1/32767 of the largest, and zeros up to a whole number of pairs; what a step is.
float round_weights(const float* x, std::size_t count, std::int16_t* to) {
  // 255 · 32767 · kMostTokens is less than 2³¹.
  constexpr float kLargest = 32767;
  static_assert(255ll * 32767 * kMostTokens < (1ll << 31));
  const DF d;
  const hn::Rebind<std::int16_t, DF> narrow;
  const std::size_t lanes = hn::Lanes(d), whole = count / lanes * lanes;
  auto tops = hn::Zero(d);
  for (std::size_t i = 0; i < whole; i += lanes) tops = hn::Max(tops, hn::Abs(hn::LoadU(d, x + i)));
  float largest = hn::GetLane(hn::MaxOfLanes(d, tops));
  for (std::size_t i = whole; i < count; ++i) largest = std::max(largest, std::abs(x[i]));
  const float steps = largest > 0 ? kLargest / largest : 0.0f;
  const auto each = hn::Set(d, steps);
  for (std::size_t i = 0; i < whole; i += lanes)
    hn::StoreU(hn::DemoteTo(narrow, hn::NearestInt(hn::Mul(hn::LoadU(d, x + i), each))), narrow, to + i);
  for (std::size_t i = whole; i < count; ++i) to[i] = static_cast<std::int16_t>(std::lrint(x[i] * steps));
  if (count % 2 == 1) to[count] = 0;
  return largest / kLargest;
}

template <std::size_t kQueries>
void add_some(const BlockOfTiles& block, std::span<const EntryColumns> groups, const float* weights, std::size_t weight_stride,
              float* sums) {
  std::int32_t pairs[kMostTokens / 2 * kQueries];
  float factors[kQueries];
  for (std::size_t r = 0; r < kQueries; ++r) {
    std::int16_t rounded[kMostTokens];
    factors[r] = round_weights(weights + r * weight_stride, block.tokens, rounded);
    for (std::size_t t = 0; t < block.tokens; t += 2) std::memcpy(&pairs[t / 2 * kQueries + r], rounded + t, sizeof(std::int32_t));
  }
  const std::size_t stride = groups.size() * kEntryColumns;
  const std::size_t usual = count_usual(groups, 2);
  std::size_t g = 0;
  for (; g < usual; g += 2) add_groups<kQueries, kUsualStride>(block, &groups[g], pairs, factors, stride, sums + g * kEntryColumns);
  for (; g < groups.size(); g += 2) add_groups<kQueries, 0>(block, &groups[g], pairs, factors, stride, sums + g * kEntryColumns);
}

void add_entries(const BlockOfTiles& block, std::span<const EntryColumns> groups, const float* weights, std::size_t num_queries,
                 std::size_t weight_stride, float* sums) {
  const std::size_t stride = groups.size() * kEntryColumns;
  std::size_t r = 0;
  for (; r + 4 <= num_queries; r += 4) add_some<4>(block, groups, weights + r * weight_stride, weight_stride, sums + r * stride);
  weights += r * weight_stride, sums += r * stride;
  switch (num_queries - r) {
    case 3:
      return add_some<3>(block, groups, weights, weight_stride, sums);
    case 2:
      return add_some<2>(block, groups, weights, weight_stride, sums);
    case 1:
      return add_some<1>(block, groups, weights, weight_stride, sums);
  }
}

#endif

}  // namespace HWY_NAMESPACE
}  // namespace veloxquant
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace veloxquant {

HWY_EXPORT(turn_rows);
HWY_EXPORT(round_rows);
HWY_EXPORT(score_entries);
HWY_EXPORT(score_wide);
HWY_EXPORT(sum_wide_entries);
HWY_EXPORT(add_entries);

void turn_rows(const float* x, std::size_t rows, std::size_t count, const float* angles, float* to) {
  HWY_DYNAMIC_DISPATCH(turn_rows)(x, rows, count, angles, to);
}

void round_rows(const float* x, std::size_t count, std::int16_t* to) {
  HWY_DYNAMIC_DISPATCH(round_rows)(x, count, to);
}

void score_entries(const BlockOfTiles& block, std::span<const EntryColumns> groups, const KeyGrid& grid,
                   const TurnedQueries& queries, float* scores, std::size_t score_stride) {
  thread_local std::vector<std::uint8_t> bytes;
  bytes.resize(groups.size() * kEntryColumns * kMostTokens);
  HWY_DYNAMIC_DISPATCH(score_entries)(block, groups, grid, queries, bytes.data(), scores, score_stride);
}

void score_wide(const std::int16_t* keys, std::size_t tokens, std::size_t rows, const KeyGrid& grid, const TurnedQueries& queries,
                float* scores, std::size_t score_stride) {
  HWY_DYNAMIC_DISPATCH(score_wide)(keys, tokens, rows, grid, queries, scores, score_stride);
}

void sum_wide_entries(const BlockOfTiles& block, std::span<const CodePlace> codes, const std::int16_t* tables, std::size_t rows,
                      std::int16_t* keys) {
  HWY_DYNAMIC_DISPATCH(sum_wide_entries)(block, codes, tables, rows, keys);
}

void add_entries(const BlockOfTiles& block, std::span<const EntryColumns> groups, const float* weights, std::size_t num_queries,
                 std::size_t weight_stride, float* sums) {
  HWY_DYNAMIC_DISPATCH(add_entries)(block, groups, weights, num_queries, weight_stride, sums);
}

}  // namespace veloxquant
#endif
