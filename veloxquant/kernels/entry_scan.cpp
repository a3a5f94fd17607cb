#include "veloxquant/kernels/entry_scan.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>
#include <vector>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "veloxquant/kernels/entry_scan.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace veloxquant {
namespace HWY_NAMESPACE {

#if HWY_TARGET == HWY_SCALAR

using reference::add_bytes;
using reference::add_scores;
using reference::round_rows;
using reference::score_bytes;
using reference::score_wide;
using reference::sum_wide_entries;
using reference::turn_rows;

#else

namespace hn = hwy::HWY_NAMESPACE;

// 16 columns in one vector, or in two where vectors are shorter: the angles of wider ones would be of two rows.
using D16 = hn::CappedTag<std::int16_t, kTurnPlanes>;
using V16 = hn::Vec<D16>;
using D32 = hn::RepartitionToWide<D16>;
using V32 = hn::Vec<D32>;
using DF = hn::RebindToFloat<D32>;
constexpr std::size_t kLanes = HWY_MIN(kTurnPlanes, HWY_LANES(std::int16_t)), kVectors = kTurnPlanes / kLanes;

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

// Lane i: the sum of a·b over lanes 2i and 2i + 1.
template <class V>
HWY_INLINE auto pair_products(V a, V b) {
  const hn::RepartitionToWide<hn::DFromV<V> > d;
  auto more = hn::Zero(d);
  const auto some = hn::ReorderWidenMulAccumulate(d, a, b, hn::Zero(d), more);
  return hn::RearrangeToOddPlusEven(some, more);
}

// Keys as sums of bytes, and as whole numbers: the i-th vectors of the planes' first and second dimensions, `t` tokens behind `at`.
struct ByteKeys {
  const std::uint8_t* at;
  const std::int16_t* offsets;
  int shift;

  HWY_INLINE void load(std::size_t t, std::size_t i, V16& first, V16& second) const {
    const D16 d;
    const hn::Rebind<std::uint8_t, D16> d8;
    const hn::Repartition<std::uint64_t, D16> halves;
    const std::uint8_t* from = at + t * kTurnColumns + i * kEntryColumns;
    const auto low = hn::BitCast(halves, hn::PromoteTo(d, hn::LoadU(d8, from))),
               high = hn::BitCast(halves, hn::PromoteTo(d, hn::LoadU(d8, from + kTurnPlanes)));
    first = whole(hn::BitCast(d, hn::InterleaveLower(halves, low, high)), i);
    second = whole(hn::BitCast(d, hn::InterleaveUpper(halves, low, high)), kVectors + i);
  }

  HWY_INLINE V16 whole(V16 bytes, std::size_t vector) const {
    return hn::Sub(hn::ShiftLeftSame(bytes, shift), hn::LoadU(D16(), offsets + vector * kLanes));
  }
};

struct WideKeys {
  const std::int16_t* at;
  std::size_t stride;

  HWY_INLINE void load(std::size_t t, std::size_t i, V16& first, V16& second) const {
    first = hn::LoadU(D16(), at + t * stride + i * kLanes);
    second = hn::LoadU(D16(), at + t * stride + kTurnPlanes + i * kLanes);
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

// Four sums of lanes, as floats.
HWY_INLINE hn::Vec<hn::FixedTag<float, 4> > add_lanes(const V32* sums) {
  const hn::FixedTag<std::int32_t, 4> d;
  const hn::FixedTag<float, 4> df;
  const V32 four = add_four(sums);
#if HWY_TARGET <= HWY_AVX2
  return hn::ConvertTo(df, hn::Add(hn::LowerHalf(d, four), hn::UpperHalf(d, four)));
#else
  return hn::ConvertTo(df, four);
#endif
}

// kQueries queries from `first` on.  keys_of(row): those of a row of columns.
template <std::size_t kQueries, class KeysOf>
HWY_INLINE void score_some(std::size_t tokens, std::size_t rows, const std::int16_t* all_angles, const TurnedQueries& queries,
                           std::size_t first, float* scores, std::size_t score_stride, const KeysOf& keys_of) {
  // Their sums become scores together.
  constexpr std::size_t kTokens = 4;
  static_assert(kTurnedTokens % kTokens == 0);
  const D16 d16;
  const D32 d32;
  const hn::FixedTag<float, 4> df;
  const std::size_t row_queries = queries.num_queries * kTurnColumns;
  for (std::size_t begin = 0; begin < tokens; begin += kTokens) {
    const std::int16_t* stretch = queries.q + begin / kTurnedTokens * rows * row_queries + first * kTurnColumns;
    V32 sums[kQueries][kTokens];
    for (std::size_t token = 0; token < kTokens; ++token) {
      const std::int16_t *q = stretch, *angles = all_angles + (begin + token) % kTurnedTokens * kTurnColumns;
      V32 of_token[kQueries];
      for (auto& sum : of_token) sum = hn::Zero(d32);
      for (std::size_t row = 0; row < rows; ++row, q += row_queries, angles += kTurnedTokens * kTurnColumns) {
        const auto keys = keys_of(row);
        for (std::size_t i = 0; i < kVectors; ++i) {
          V16 a, b;
          keys.load(begin + token, i, a, b);
          const V16 c = hn::LoadU(d16, angles + i * kLanes), s = hn::LoadU(d16, angles + kTurnPlanes + i * kLanes);
          const V16 x = hn::Sub(hn::MulFixedPoint15(a, c), hn::MulFixedPoint15(b, s)),
                    y = hn::Add(hn::MulFixedPoint15(b, c), hn::MulFixedPoint15(a, s));
          for (std::size_t r = 0; r < kQueries; ++r) {
            const std::int16_t* of_query = q + r * kTurnColumns + i * kLanes;
            of_token[r] = hn::Add(of_token[r], pair_products(x, hn::LoadU(d16, of_query)));
            of_token[r] = hn::Add(of_token[r], pair_products(y, hn::LoadU(d16, of_query + kTurnPlanes)));
          }
        }
      }
      for (std::size_t r = 0; r < kQueries; ++r) sums[r][token] = of_token[r];
    }
    for (std::size_t r = 0; r < kQueries; ++r) {
      float* to = scores + (first + r) * score_stride + begin;
      const auto four = hn::Mul(hn::Set(df, queries.factors[first + r]), add_lanes(sums[r]));
      if (begin + kTokens <= tokens) {
        hn::StoreU(four, df, to);
      } else {
        float last[kTokens];
        hn::StoreU(four, df, last);
        std::copy_n(last, tokens - begin, to);
      }
    }
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

void score_bytes(const std::uint8_t* bytes, std::size_t tokens, std::size_t rows, const KeyGrid& grid, const TurnedQueries& queries,
                 float* scores, std::size_t score_stride) {
  score_all(tokens, rows, grid.angles, queries, scores, score_stride, [&](std::size_t row) HWY_ATTR {
    return ByteKeys{bytes + row * kMostTokens * kTurnColumns, grid.offsets + row * kTurnColumns, grid.shift};
  });
}

void score_wide(const std::int16_t* keys, std::size_t tokens, std::size_t rows, const KeyGrid& grid, const TurnedQueries& queries,
                float* scores, std::size_t score_stride) {
  const std::size_t stride = rows * kTurnColumns;
  score_all(tokens, rows, grid.angles, queries, scores, score_stride, [&](std::size_t row) HWY_ATTR {
    return WideKeys{keys + row * kTurnColumns, stride};
  });
}

// One key, kQueries queries from `first` on.
template <std::size_t kQueries>
void add_some_scores(const float* key, std::size_t rows, const float* angles, const FloatQueries& queries, const float* q,
                     std::size_t first, float* scores, std::size_t score_stride) {
  const DF d;
  hn::Vec<DF> sums[kQueries];
  for (auto& sum : sums) sum = hn::Zero(d);
  q += first * kTurnColumns;
  for (std::size_t row = 0; row < rows; ++row, key += kTurnColumns, angles += kTurnColumns, q += queries.num_queries * kTurnColumns)
    for (std::size_t i = 0; i < kTurnPlanes; i += hn::Lanes(d)) {
      const auto a = hn::LoadU(d, key + i), b = hn::LoadU(d, key + kTurnPlanes + i), c = hn::LoadU(d, angles + i),
                 s = hn::LoadU(d, angles + kTurnPlanes + i), x = hn::NegMulAdd(b, s, hn::Mul(a, c)),
                 y = hn::MulAdd(a, s, hn::Mul(b, c));
      for (std::size_t r = 0; r < kQueries; ++r) {
        const float* of_query = q + r * kTurnColumns + i;
        sums[r] = hn::MulAdd(x, hn::LoadU(d, of_query), sums[r]);
        sums[r] = hn::MulAdd(y, hn::LoadU(d, of_query + kTurnPlanes), sums[r]);
      }
    }
  for (std::size_t r = 0; r < kQueries; ++r)
    scores[(first + r) * score_stride] += queries.factors[first + r] * hn::GetLane(hn::SumOfLanes(d, sums[r]));
}

void add_scores(const float* keys, std::span<const std::size_t> tokens, std::size_t rows, const float* angles,
                const FloatQueries& queries, float* scores, std::size_t score_stride) {
  const std::size_t columns = rows * kTurnColumns;
  for (const std::size_t t : tokens) {
    const float *q = queries.q + t / kTurnedTokens * queries.num_queries * columns,
                *of_token = angles + t % kTurnedTokens * columns;
    for (std::size_t r = 0; r < queries.num_queries;) {
      const std::size_t some = std::min<std::size_t>(4, queries.num_queries - r);
      const auto add = some == 1   ? add_some_scores<1>
                       : some == 2 ? add_some_scores<2>
                       : some == 3 ? add_some_scores<3>
                                   : add_some_scores<4>;
      add(keys, rows, of_token, queries, q, r, scores + t, score_stride);
      r += some;
    }
    keys += columns;
  }
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

// Bytes of a row of columns, all at once or, where vectors are shorter, in two halves.
using DRow = hn::CappedTag<std::uint8_t, kTurnColumns>;
constexpr std::size_t kRowLanes = HWY_MIN(kTurnColumns, HWY_LANES(std::uint8_t));

// A row of columns of all tokens: their sums stay in registers.  weights [pairs of tokens, kQueries]: of two tokens beside each
// other.
template <std::size_t kQueries>
void add_row(const std::uint8_t* bytes, std::size_t tokens, const std::int32_t* weights, const float* factors,
             std::size_t sum_stride, float* out) {
  const DRow d8;
  const hn::Repartition<std::int16_t, DRow> d16;
  const hn::Repartition<std::int32_t, DRow> d32;
  using VSum = hn::Vec<decltype(d32)>;
  for (std::size_t half = 0; half < kTurnColumns; half += kRowLanes, bytes += kRowLanes, out += kRowLanes) {
    VSum sums[4][kQueries];  // of the quarters of each 16 columns
    for (auto& of_quarter : sums)
      for (auto& sum : of_quarter) sum = hn::Zero(d32);
    const auto zero = hn::Zero(d8);
    const std::uint8_t* at = bytes;
    // The last token of an odd number has a neighbour of weight 0.
    for (std::size_t pair = 0; 2 * pair < tokens; ++pair, at += 2 * kTurnColumns) {
      const auto first = hn::LoadU(d8, at), second = hn::LoadU(d8, at + kTurnColumns), low = hn::InterleaveLower(d8, first, second),
                 high = hn::InterleaveUpper(d8, first, second);
      const hn::Vec<decltype(d16)> columns[4] = {
          hn::BitCast(d16, hn::InterleaveLower(d8, low, zero)), hn::BitCast(d16, hn::InterleaveUpper(d8, low, zero)),
          hn::BitCast(d16, hn::InterleaveLower(d8, high, zero)), hn::BitCast(d16, hn::InterleaveUpper(d8, high, zero))};
      for (std::size_t r = 0; r < kQueries; ++r) {
        const auto weight = hn::BitCast(d16, hn::Set(d32, weights[pair * kQueries + r]));
        for (std::size_t quarter = 0; quarter < 4; ++quarter)
          sums[quarter][r] = hn::Add(sums[quarter][r], pair_products(columns[quarter], weight));
      }
    }
    for (std::size_t r = 0; r < kQueries; ++r)
      for (std::size_t quarter = 0; quarter < 4; ++quarter) {
        HWY_ALIGN std::int32_t lanes[kRowLanes / 4];
        hn::Store(sums[quarter][r], d32, lanes);
        for (std::size_t block = 0; block < kRowLanes; block += 16)
          for (std::size_t i = 0; i < 4; ++i)
            out[r * sum_stride + block + quarter * 4 + i] += factors[r] * static_cast<float>(lanes[block / 4 + i]);
      }
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
void add_some(const std::uint8_t* bytes, std::size_t tokens, std::size_t rows, const float* weights, std::size_t weight_stride,
              float* sums) {
  std::int32_t pairs[kMostTokens / 2 * kQueries];
  float factors[kQueries];
  for (std::size_t r = 0; r < kQueries; ++r) {
    std::int16_t rounded[kMostTokens];
    factors[r] = round_weights(weights + r * weight_stride, tokens, rounded);
    for (std::size_t t = 0; t < tokens; t += 2) std::memcpy(&pairs[t / 2 * kQueries + r], rounded + t, sizeof(std::int32_t));
  }
  for (std::size_t row = 0; row < rows; ++row)
    add_row<kQueries>(bytes + row * kMostTokens * kTurnColumns, tokens, pairs, factors, rows * kTurnColumns,
                      sums + row * kTurnColumns);
}

void add_bytes(const std::uint8_t* bytes, std::size_t tokens, std::size_t rows, const float* weights, std::size_t num_queries,
               std::size_t weight_stride, float* sums) {
  // As many as registers have room for.
  constexpr std::size_t kAtOnce = HWY_TARGET <= HWY_AVX3 ? 4 : 3;
  for (std::size_t r = 0; r < num_queries;) {
    const std::size_t some = std::min(kAtOnce, num_queries - r);
    const auto add = some == 1 ? add_some<1> : some == 2 ? add_some<2> : some == 3 ? add_some<3> : add_some<kAtOnce>;
    add(bytes, tokens, rows, weights + r * weight_stride, weight_stride, sums + r * rows * kTurnColumns);
    r += some;
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
HWY_EXPORT(score_bytes);
HWY_EXPORT(score_wide);
HWY_EXPORT(add_scores);
HWY_EXPORT(sum_wide_entries);
HWY_EXPORT(add_bytes);

void turn_rows(const float* x, std::size_t rows, std::size_t count, const float* angles, float* to) {
  HWY_DYNAMIC_DISPATCH(turn_rows)(x, rows, count, angles, to);
}

void round_rows(const float* x, std::size_t count, std::int16_t* to) {
  HWY_DYNAMIC_DISPATCH(round_rows)(x, count, to);
}

namespace {

std::uint64_t entry(const std::uint8_t* table, std::uint8_t code) {
  std::uint64_t bytes;
  std::memcpy(&bytes, table + std::size_t{code} * kEntryColumns, sizeof(bytes));
  return bytes;
}

// Of most codes, known when this is compiled; those of the last word of a token stand closer together.
constexpr std::size_t kUsualStride = 4;

// The sums of a group for whole tiles, kTurnColumns apart.  Eight bytes are one number, since no sum of bytes is more than 255.
template <std::size_t kCount, bool kUsual>
void look_up_group(const BlockOfTiles& block, const EntryColumns& group, std::uint8_t* to) {
  const auto [bytes, tile_bytes, tile_tokens, tokens] = block;
  for (std::size_t begin = 0; begin < tokens; begin += tile_tokens) {
    const std::uint8_t *tile = bytes + begin / tile_tokens * tile_bytes, *codes[kCount + 1], *tables[kCount + 1];
    std::size_t strides[kCount + 1];
    for (std::size_t i = 0; i < kCount; ++i) {
      codes[i] = tile + group.codes[i].offset, tables[i] = group.tables[i];
      strides[i] = kUsual ? kUsualStride : group.codes[i].stride;
    }
    for (std::size_t t = 0; t < tile_tokens; ++t, to += kTurnColumns) {
      std::uint64_t sum = 0;
      for (std::size_t i = 0; i < kCount; ++i) sum += entry(tables[i], codes[i][t * strides[i]]);
      std::memcpy(to, &sum, sizeof(sum));
    }
  }
}

template <std::size_t kCount>
void look_up_group(const BlockOfTiles& block, const EntryColumns& group, std::uint8_t* to) {
  const bool usual =
      std::all_of(group.codes, group.codes + kCount, [](const CodePlace& code) { return code.stride == kUsualStride; });
  return usual ? look_up_group<kCount, true>(block, group, to) : look_up_group<kCount, false>(block, group, to);
}

}  // namespace

const std::uint8_t* look_up_entries(std::span<const BlockOfTiles> blocks, std::span<const EntryColumns> groups) {
  static constexpr void (*kOfCount[])(const BlockOfTiles&, const EntryColumns&, std::uint8_t*) = {
      look_up_group<0>, look_up_group<1>, look_up_group<2>, look_up_group<3>, look_up_group<4>};
  static_assert(std::size(kOfCount) == kMostEntries + 1);
  const std::size_t block_bytes = groups.size() * kEntryColumns * kMostTokens;
  thread_local std::vector<std::uint8_t> memory;
  memory.resize(std::max(memory.size(), kLookUpBlocks * block_bytes));  // at once, whatever the context
  // One group after the other: its tables stay in the first-level cache.
  for (std::size_t g = 0; g < groups.size(); ++g) {
    std::uint8_t* to = memory.data() + g / kTurnGroups * kMostTokens * kTurnColumns + g % kTurnGroups * kEntryColumns;
    for (const auto& block : blocks) {
      kOfCount[groups[g].count](block, groups[g], to);
      to += block_bytes;
    }
  }
  return memory.data();
}

void score_bytes(const std::uint8_t* bytes, std::size_t tokens, std::size_t rows, const KeyGrid& grid, const TurnedQueries& queries,
                 float* scores, std::size_t score_stride) {
  HWY_DYNAMIC_DISPATCH(score_bytes)(bytes, tokens, rows, grid, queries, scores, score_stride);
}

void score_wide(const std::int16_t* keys, std::size_t tokens, std::size_t rows, const KeyGrid& grid, const TurnedQueries& queries,
                float* scores, std::size_t score_stride) {
  HWY_DYNAMIC_DISPATCH(score_wide)(keys, tokens, rows, grid, queries, scores, score_stride);
}

void add_scores(const float* keys, std::span<const std::size_t> tokens, std::size_t rows, const float* angles,
                const FloatQueries& queries, float* scores, std::size_t score_stride) {
  HWY_DYNAMIC_DISPATCH(add_scores)(keys, tokens, rows, angles, queries, scores, score_stride);
}

void sum_wide_entries(const BlockOfTiles& block, std::span<const CodePlace> codes, const std::int16_t* tables, std::size_t rows,
                      std::int16_t* keys) {
  HWY_DYNAMIC_DISPATCH(sum_wide_entries)(block, codes, tables, rows, keys);
}

void add_bytes(const std::uint8_t* bytes, std::size_t tokens, std::size_t rows, const float* weights, std::size_t num_queries,
               std::size_t weight_stride, float* sums) {
  HWY_DYNAMIC_DISPATCH(add_bytes)(bytes, tokens, rows, weights, num_queries, weight_stride, sums);
}

}  // namespace veloxquant
#endif
