#include "veloxquant/kernels/entry_scan.h"

#include <algorithm>
#include <array>
#include <utility>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "veloxquant/kernels/entry_scan.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace veloxquant {
namespace HWY_NAMESPACE {

#if HWY_TARGET == HWY_SCALAR

using reference::add_entries;
using reference::score_entries;
using reference::turn_rows;

#else

namespace hn = hwy::HWY_NAMESPACE;

// A row of an entry in one vector, or in two where vectors are shorter: wider ones would need rows put together.
using D = hn::CappedTag<float, kEntryColumns>;
using V = hn::Vec<D>;
constexpr std::size_t kLanes = HWY_MIN(kEntryColumns, HWY_LANES(float)), kVectors = kEntryColumns / kLanes;

// Sums at once, that the registers hold beside what they are made of.
constexpr std::size_t kSums = HWY_TARGET <= HWY_AVX3 ? 16 : 8;

HWY_INLINE V turned(V x, const float* angles) {
  const D d;
  return hn::MulAdd(x, hn::LoadU(d, angles), hn::Mul(hn::Reverse2(d, x), hn::LoadU(d, angles + kEntryColumns)));
}

void turn_rows(const float* rows, std::size_t groups, std::size_t num_rows, const float* angles, float* to) {
  const D d;
  for (std::size_t g = 0; g < groups; ++g, angles += 2 * kEntryColumns)
    for (std::size_t r = 0; r < num_rows; ++r, rows += kEntryColumns, to += kEntryColumns)
      for (std::size_t i = 0; i < kEntryColumns; i += kLanes) hn::StoreU(turned(hn::LoadU(d, rows + i), angles + i), d, to + i);
}

// The entries of one group of columns.  kStride: of both codes where that is known when this is compiled, else 0.
template <std::size_t kStride>
struct Entries {
  const std::uint8_t *first, *second;
  const float *first_table, *second_table;
  std::size_t first_stride, second_stride;

  HWY_INLINE Entries(const std::uint8_t* tile, std::size_t token, const EntryColumns& columns)
      : first_table(columns.tables[0]),
        second_table(columns.tables[1]),
        first_stride(kStride > 0 ? kStride : columns.codes[0].stride),
        second_stride(kStride > 0 ? kStride : columns.codes[1].stride) {
    first = tile + columns.codes[0].offset + token * first_stride;
    second = tile + columns.codes[1].offset + token * second_stride;
  }

  HWY_INLINE V load(std::size_t t, std::size_t i) const {
    const D d;
    return hn::Add(hn::LoadU(d, first_table + first[t * first_stride] * kEntryColumns + i),
                   hn::LoadU(d, second_table + second[t * second_stride] * kEntryColumns + i));
  }
};

constexpr std::size_t kUsualStride = 4;

// Groups before the first whose codes lie otherwise: only the last word of a token is shorter.
std::size_t count_usual(std::span<const EntryColumns> groups) {
  const auto usual = [](const EntryColumns& columns) {
    return columns.codes[0].stride == kUsualStride && columns.codes[1].stride == kUsualStride;
  };
  return static_cast<std::size_t>(std::find_if_not(groups.begin(), groups.end(), usual) - groups.begin());
}

// sums[r · kTokens + t] += one group's part of the scores; q [kQueries, kEntryColumns].
template <std::size_t kTokens, std::size_t kQueries, std::size_t kStride>
HWY_INLINE void score_group(const Entries<kStride>& entries, const float* q, const float* angles, V* HWY_RESTRICT sums) {
  const D d;
  for (std::size_t i = 0; i < kEntryColumns; i += kLanes) {
    V queries[kQueries];
    for (std::size_t r = 0; r < kQueries; ++r) queries[r] = hn::LoadU(d, q + r * kEntryColumns + i);
    for (std::size_t t = 0; t < kTokens; ++t) {
      const V key = turned(entries.load(t, i), angles + t * 2 * kEntryColumns + i);
      for (std::size_t r = 0; r < kQueries; ++r) sums[r * kTokens + t] = hn::MulAdd(key, queries[r], sums[r * kTokens + t]);
    }
  }
}

// Of four vectors: the sums of their lanes, or of those of each half of them.
HWY_INLINE V add_four(const V* x) {
  const D d;
  const hn::Repartition<double, D> pairs;
  const auto lanes = [&](V a, V b) HWY_ATTR {
    return hn::BitCast(pairs, hn::Add(hn::InterleaveLower(d, a, b), hn::InterleaveUpper(d, a, b)));
  };
  const auto a = lanes(x[0], x[1]), b = lanes(x[2], x[3]);
  return hn::Add(hn::BitCast(d, hn::InterleaveLower(pairs, a, b)), hn::BitCast(d, hn::InterleaveUpper(pairs, a, b)));
}

// out[i] = the sum of the lanes of sums[i].
template <std::size_t kCount>
HWY_INLINE void add_lanes(const V* sums, float* out) {
  const D d;
  static_assert(kCount % 8 == 0);
  for (std::size_t i = 0; i < kCount; i += 8) {
    const V a = add_four(sums + i), b = add_four(sums + i + 4);
#if HWY_TARGET <= HWY_AVX2
    hn::StoreU(hn::Add(hn::ConcatLowerLower(d, b, a), hn::ConcatUpperUpper(d, b, a)), d, out + i);
#else
    hn::StoreU(a, d, out + i);
    hn::StoreU(b, d, out + i + 4);
#endif
  }
}

// Queries first … first + kQueries − 1, kTokens tokens at once; `usual` groups have the usual stride.
template <std::size_t kQueries>
void score_some(const BlockOfTiles& block, std::span<const EntryColumns> groups, std::size_t usual, const TurnedQueries& queries,
                std::size_t first, float* scores, std::size_t score_stride) {
  constexpr std::size_t kTokens = HWY_MIN(kSums / kQueries, kTurnedTokens);
  const D d;
  const std::size_t group_queries = queries.num_queries * kEntryColumns;
  const std::uint8_t* tile = block.bytes;
  for (std::size_t t = 0, in_tile = 0; t < block.tokens; t += kTokens, in_tile += kTokens) {
    if (in_tile == block.tile_tokens) tile += block.tile_bytes, in_tile = 0;
    const float* q = queries.q + t / kTurnedTokens * groups.size() * group_queries + first * kEntryColumns;
    const float* angles = queries.angles + t % kTurnedTokens * 2 * kEntryColumns;
    V sums[kTokens * kQueries];
    for (auto& sum : sums) sum = hn::Zero(d);
    const auto score = [&]<std::size_t kStride>(std::size_t from, std::size_t to) HWY_ATTR {
      for (std::size_t g = from; g < to; ++g, q += group_queries, angles += kTurnedTokens * 2 * kEntryColumns)
        score_group<kTokens, kQueries>(Entries<kStride>(tile, in_tile, groups[g]), q, angles, sums);
    };
    score.template operator()<kUsualStride>(0, usual);
    score.template operator()<0>(usual, groups.size());
    float out[kTokens * kQueries];
    add_lanes<kTokens * kQueries>(sums, out);
    const std::size_t some = std::min(kTokens, block.tokens - t);
    for (std::size_t r = 0; r < kQueries; ++r) std::copy_n(out + r * kTokens, some, scores + (first + r) * score_stride + t);
  }
}

void score_entries(const BlockOfTiles& block, std::span<const EntryColumns> groups, const TurnedQueries& queries, float* scores,
                   std::size_t score_stride) {
  const std::size_t usual = count_usual(groups);
  std::size_t r = 0;
  for (; r + 4 <= queries.num_queries; r += 4) score_some<4>(block, groups, usual, queries, r, scores, score_stride);
  for (; r + 2 <= queries.num_queries; r += 2) score_some<2>(block, groups, usual, queries, r, scores, score_stride);
  if (r < queries.num_queries) score_some<1>(block, groups, usual, queries, r, scores, score_stride);
}

// kGroups groups of one tile at once: their sums stay in registers, and weights are loaded once for them.
template <std::size_t kGroups, std::size_t kQueries, std::size_t kStride>
HWY_INLINE void add_tile(const std::uint8_t* tile, std::size_t tokens, const EntryColumns* groups, const float* weights,
                         std::size_t weight_stride, V (&sums)[kVectors][kGroups][kQueries]) {
  const D d;
  for (std::size_t i = 0; i < kVectors; ++i) {
    const auto entries = [&]<std::size_t... kGroup>(std::index_sequence<kGroup...>) {
      return std::array{Entries<kStride>(tile, 0, groups[kGroup])...};
    }
    (std::make_index_sequence<kGroups>());
    for (std::size_t t = 0; t < tokens; ++t) {
      V weight[kQueries];
      for (std::size_t r = 0; r < kQueries; ++r) weight[r] = hn::Set(d, weights[r * weight_stride + t]);
      for (std::size_t g = 0; g < kGroups; ++g) {
        const V value = entries[g].load(t, i * kLanes);
        for (std::size_t r = 0; r < kQueries; ++r) sums[i][g][r] = hn::MulAdd(weight[r], value, sums[i][g][r]);
      }
    }
  }
}

template <std::size_t kGroups, std::size_t kQueries>
void add_groups(const BlockOfTiles& block, const EntryColumns* groups, const float* weights, std::size_t weight_stride,
                std::size_t sum_stride, float* out) {
  const D d;
  V sums[kVectors][kGroups][kQueries];
  const auto each = [&](const auto& use) HWY_ATTR {
    for (std::size_t i = 0; i < kVectors; ++i)
      for (std::size_t g = 0; g < kGroups; ++g)
        for (std::size_t r = 0; r < kQueries; ++r) use(sums[i][g][r], out + r * sum_stride + g * kEntryColumns + i * kLanes);
  };
  each([&](V& sum, const float* from) HWY_ATTR { sum = hn::LoadU(d, from); });
  const bool usual = count_usual({groups, kGroups}) == kGroups;
  for (std::size_t t = 0; t < block.tokens; t += block.tile_tokens) {
    const std::uint8_t* tile = block.bytes + t / block.tile_tokens * block.tile_bytes;
    const std::size_t some = std::min(block.tile_tokens, block.tokens - t);
    if (usual) {
      add_tile<kGroups, kQueries, kUsualStride>(tile, some, groups, weights + t, weight_stride, sums);
    } else {
      add_tile<kGroups, kQueries, 0>(tile, some, groups, weights + t, weight_stride, sums);
    }
  }
  each([&](const V& sum, float* to) HWY_ATTR { hn::StoreU(sum, d, to); });
}

template <std::size_t kQueries>
void add_some(const BlockOfTiles& block, std::span<const EntryColumns> groups, const float* weights, std::size_t weight_stride,
              float* sums) {
  const std::size_t stride = groups.size() * kEntryColumns;
  std::size_t g = 0;
  for (; g + 2 <= groups.size(); g += 2)
    add_groups<2, kQueries>(block, &groups[g], weights, weight_stride, stride, sums + g * kEntryColumns);
  if (g < groups.size()) add_groups<1, kQueries>(block, &groups[g], weights, weight_stride, stride, sums + g * kEntryColumns);
}

void add_entries(const BlockOfTiles& block, std::span<const EntryColumns> groups, const float* weights, std::size_t num_queries,
                 std::size_t weight_stride, float* sums) {
  const std::size_t stride = groups.size() * kEntryColumns;
  std::size_t r = 0;
  for (; r + 4 <= num_queries; r += 4) add_some<4>(block, groups, weights + r * weight_stride, weight_stride, sums + r * stride);
  for (; r + 2 <= num_queries; r += 2) add_some<2>(block, groups, weights + r * weight_stride, weight_stride, sums + r * stride);
  if (r < num_queries) add_some<1>(block, groups, weights + r * weight_stride, weight_stride, sums + r * stride);
}

#endif

}  // namespace HWY_NAMESPACE
}  // namespace veloxquant
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace veloxquant {

HWY_EXPORT(turn_rows);
HWY_EXPORT(score_entries);
HWY_EXPORT(add_entries);

void turn_rows(const float* rows, std::size_t groups, std::size_t num_rows, const float* angles, float* to) {
  HWY_DYNAMIC_DISPATCH(turn_rows)(rows, groups, num_rows, angles, to);
}

void score_entries(const BlockOfTiles& block, std::span<const EntryColumns> groups, const TurnedQueries& queries, float* scores,
                   std::size_t score_stride) {
  HWY_DYNAMIC_DISPATCH(score_entries)(block, groups, queries, scores, score_stride);
}

void add_entries(const BlockOfTiles& block, std::span<const EntryColumns> groups, const float* weights, std::size_t num_queries,
                 std::size_t weight_stride, float* sums) {
  HWY_DYNAMIC_DISPATCH(add_entries)(block, groups, weights, num_queries, weight_stride, sums);
}

}  // namespace veloxquant
#endif
