#include "veloxquant/kernels/lut_scan.h"

#include <algorithm>
#include <cmath>

// Look-ups in tables of 128 bytes need AVX-512 VBMI, which Highway leaves out unless asked.
#define HWY_WANT_AVX3_DL
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "veloxquant/kernels/lut_scan.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace veloxquant {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Where look-ups are shuffles of integers, not loads of floats.
constexpr bool kRoundsBytes = HWY_TARGET == HWY_AVX3_DL, kRoundsNibbles = HWY_TARGET != HWY_SCALAR;

// Integers of two digits: each code's products from its least one on, in as many steps as there are for the widest range of a code.
void round_products(const float* products, std::size_t codes, std::size_t centroids, ScanTables& tables) {
  float widest = 0, offset = 0;
  std::vector<float> least(codes);
  for (std::size_t code = 0; code < codes; ++code) {
    const auto [low, high] = std::minmax_element(products + code * centroids, products + (code + 1) * centroids);
    least[code] = *low;
    offset += *low;
    widest = std::max(widest, *high - *low);
  }
  tables.offset = offset;
  // Of nibbles, digits are of 7 bits, so that those of two codes can be added as bytes.
  const int bits = centroids == 16 ? 7 : 8;
  const float most = static_cast<float>((1 << 2 * bits) - 1);
  tables.step = widest > 0 ? widest / most : 1.0f;
  // An even number of codes, so that nibbles come in pairs: the last one adds nothing.
  tables.bytes.assign((codes + codes % 2) * 2 * centroids, 0);
  const float inverse = 1 / tables.step;
  for (std::size_t code = 0; code < codes; ++code) {
    std::uint8_t* low = tables.bytes.data() + code * 2 * centroids;
    for (std::size_t i = 0; i < centroids; ++i) {
      const float steps = std::min((products[code * centroids + i] - least[code]) * inverse + 0.5f, most);
      const auto entry = static_cast<std::uint32_t>(static_cast<std::int32_t>(steps));
      low[i] = static_cast<std::uint8_t>(entry % (1U << bits));
      low[centroids + i] = static_cast<std::uint8_t>(entry >> bits);
    }
  }
}

void make_scan_tables(const float* products, std::size_t codes, std::size_t centroids, ScanTables& tables) {
  tables.codes = codes;
  if (centroids == 16 ? kRoundsNibbles : kRoundsBytes)
    round_products(products, codes, centroids, tables);
  else
    tables.floats.assign(products, products + codes * centroids);
}

// Where the scores of the bytes at `place` go, those of every fourth byte together, kQuarter apart.
constexpr std::size_t kQuarter = kScanGroup / 4;
HWY_INLINE std::size_t scores_of(std::size_t place) {
  return place / kScanGroup * kScanGroup + place % kScanGroup / 4;
}

// Calls scan.operator()<n>(place, scores, at) for n vectors of bytes from `place` on, n = kCount or 1, whose scores begin at
// scores_of(at); those of the last group go by way of a buffer unless it is whole.
template <std::size_t kCount, class Scan>
void each_vectors(std::size_t tokens, std::size_t lanes, float* scores, const Scan& scan) {
  const std::size_t whole = tokens / kScanGroup * kScanGroup;
  std::size_t t = 0;
  for (; t + kCount * lanes <= whole; t += kCount * lanes) scan.template operator()<kCount>(t, scores, t);
  for (; t < whole; t += lanes) scan.template operator()<1>(t, scores, t);
  if (whole == tokens) return;
  float rest[kScanGroup];
  for (std::size_t at = 0; at < kScanGroup; at += lanes) scan.template operator()<1>(whole + at, rest, at);
  std::copy_n(rest, tokens - whole, scores + whole);
}

#if HWY_TARGET != HWY_SCALAR

// Sums of one vector of tokens, of digits of kBits bits that stand in lanes of 16: Σ(even token + 256 · odd token) and Σ odd token,
// each modulo 2¹⁶.
template <int kBits>
struct Sums {
  using D8 = hn::ScalableTag<std::uint8_t>;
  using D16 = hn::Repartition<std::uint16_t, D8>;
  hn::Vec<D16> low, low_odd, high, high_odd;

  HWY_INLINE void clear() { low = low_odd = high = high_odd = hn::Zero(D16()); }

  HWY_INLINE void add(hn::Vec<D8> low_bytes, hn::Vec<D8> high_bytes) {
    const D16 d;
    const auto l = hn::BitCast(d, low_bytes), h = hn::BitCast(d, high_bytes);
    low = hn::Add(low, l);
    high = hn::Add(high, h);
    low_odd = hn::Add(low_odd, shift(l));
    high_odd = hn::Add(high_odd, shift(h));
  }

  // By 8 bits to the right, where shuffles do not wait for shifts.
  static HWY_INLINE hn::Vec<D16> shift(hn::Vec<D16> x) { return hn::MulHigh(x, hn::Set(D16(), 256)); }

  HWY_INLINE void write(float step, float offset, float* scores) const {
    const hn::Repartition<std::uint32_t, D8> d32;
    const hn::RebindToSigned<decltype(d32)> di;
    const hn::RebindToFloat<decltype(di)> df;
    const auto vstep = hn::Set(df, step), voffset = hn::Set(df, offset);
    const auto mask = hn::Set(d32, 0xFFFF);
    const auto write_quarter = [&](std::size_t quarter, hn::Vec<decltype(d32)> l, hn::Vec<decltype(d32)> h) HWY_ATTR {
      const auto sum = hn::ConvertTo(df, hn::BitCast(di, hn::Add(l, hn::ShiftLeft<kBits>(h))));
      hn::StoreU(hn::MulAdd(sum, vstep, voffset), df, scores + quarter * kQuarter);
    };
    const auto lower = [&](hn::Vec<D16> x) HWY_ATTR { return hn::And(hn::BitCast(d32, x), mask); };
    const auto upper = [&](hn::Vec<D16> x) HWY_ATTR { return hn::ShiftRight<16>(hn::BitCast(d32, x)); };
    const auto low_even = hn::Sub(low, hn::ShiftLeft<8>(low_odd)), high_even = hn::Sub(high, hn::ShiftLeft<8>(high_odd));
    write_quarter(0, lower(low_even), lower(high_even));
    write_quarter(1, lower(low_odd), lower(high_odd));
    write_quarter(2, upper(low_even), upper(high_even));
    write_quarter(3, upper(low_odd), upper(high_odd));
  }
};

// Entries of a table of 16 bytes, which each 128 bits of `table` hold, by the low nibbles of bytes.
template <class V>
HWY_INLINE V look_up(V table, V bytes) {
#if HWY_TARGET == HWY_AVX3_DL
  return V{_mm512_permutexvar_epi8(bytes.raw, table.raw)};  // by six bits, and the two more find a copy
#else
  return hn::TableLookupBytes(table, hn::And(bytes, hn::Set(hn::DFromV<V>(), 15)));
#endif
}

// kCount vectors of tokens at once, for which tables are loaded once.
template <std::size_t kCount>
void scan_nibbles_of(const ScanTables& tables, const ScanCodes& codes, std::size_t place, float scale, float* scores,
                     std::size_t at) {
  using Sum = Sums<7>;
  const Sum::D8 d;
  const Sum::D16 d16;
  const std::size_t lanes = hn::Lanes(d), bytes = (tables.codes + 1) / 2;
  Sum sums[kCount];
  for (auto& some : sums) some.clear();
  const std::uint8_t *table = tables.bytes.data(), *from = codes.bytes + place;
  for (std::size_t b = 0; b < bytes; ++b, table += 64, from += codes.stride) {
    const auto even_low = hn::LoadDup128(d, table), even_high = hn::LoadDup128(d, table + 16),
               odd_low = hn::LoadDup128(d, table + 32), odd_high = hn::LoadDup128(d, table + 48);
    for (std::size_t i = 0; i < kCount; ++i) {
      const auto even = hn::LoadU(d, from + i * lanes), odd = hn::BitCast(d, hn::ShiftRight<4>(hn::BitCast(d16, even)));
      sums[i].add(hn::Add(look_up(even_low, even), look_up(odd_low, odd)),
                  hn::Add(look_up(even_high, even), look_up(odd_high, odd)));
    }
  }
  for (std::size_t i = 0; i < kCount; ++i)
    sums[i].write(scale * tables.step, scale * tables.offset, scores + scores_of(at + i * lanes));
}

void scan_nibbles(const ScanTables& tables, const ScanCodes& codes, float scale, float* scores) {
  each_vectors<HWY_TARGET <= HWY_AVX3 ? 4 : 2>(codes.tokens, hn::Lanes(Sums<7>::D8()), scores,
                                               [&]<std::size_t kCount>(std::size_t place, float* out, std::size_t at) {
                                                 scan_nibbles_of<kCount>(tables, codes, place, scale, out, at);
                                               });
}

#else

void scan_nibbles(const ScanTables& tables, const ScanCodes& codes, float scale, float* scores) {
  reference::scan_nibbles(tables.floats.data(), tables.codes, codes, scale, scores);
}

#endif

#if HWY_TARGET == HWY_AVX3_DL

// A table of 256 bytes in four registers.
struct ByteTable {
  using V = hn::Vec<hn::ScalableTag<std::uint8_t>>;
  V quarters[4];

  HWY_INLINE explicit ByteTable(const std::uint8_t* table) {
    for (std::size_t i = 0; i < 4; ++i) quarters[i] = hn::LoadU(hn::ScalableTag<std::uint8_t>(), table + 64 * i);
  }

  HWY_INLINE V operator()(V code, __mmask64 upper) const {
    const __m512i low = _mm512_permutex2var_epi8(quarters[0].raw, code.raw, quarters[1].raw),
                  high = _mm512_permutex2var_epi8(quarters[2].raw, code.raw, quarters[3].raw);
    return V{_mm512_mask_mov_epi8(low, upper, high)};
  }
};

template <std::size_t kCount>
void scan_bytes_of(const ScanTables& tables, const ScanCodes& codes, std::size_t place, float scale, float* scores,
                   std::size_t at) {
  const hn::ScalableTag<std::uint8_t> d;
  const std::size_t lanes = hn::Lanes(d);
  Sums<8> sums[kCount];
  for (auto& some : sums) some.clear();
  const std::uint8_t *table = tables.bytes.data(), *from = codes.bytes + place;
  for (std::size_t code = 0; code < tables.codes; ++code, table += 512, from += codes.stride) {
    const ByteTable low(table), high(table + 256);
    for (std::size_t i = 0; i < kCount; ++i) {
      const auto some = hn::LoadU(d, from + i * lanes);
      const __mmask64 upper = _mm512_movepi8_mask(some.raw);
      sums[i].add(low(some, upper), high(some, upper));
    }
  }
  for (std::size_t i = 0; i < kCount; ++i)
    sums[i].write(scale * tables.step, scale * tables.offset, scores + scores_of(at + i * lanes));
}

// Sums of four vectors and the tables of one code fill the registers.
void scan_bytes(const ScanTables& tables, const ScanCodes& codes, float scale, float* scores) {
  each_vectors<4>(codes.tokens, 64, scores, [&]<std::size_t kCount>(std::size_t place, float* out, std::size_t at) {
    scan_bytes_of<kCount>(tables, codes, place, scale, out, at);
  });
}

#else

// Four tokens at once, so that their sums do not wait for each other.
void scan_bytes(const ScanTables& tables, const ScanCodes& codes, float scale, float* scores) {
  constexpr std::size_t kTokens = 4;
  each_vectors<1>(codes.tokens, kTokens, scores, [&]<std::size_t>(std::size_t place, float* out, std::size_t at) {
    float sums[kTokens] = {};
    const float* table = tables.floats.data();
    const std::uint8_t* from = codes.bytes + place;
    for (std::size_t code = 0; code < tables.codes; ++code, table += 256, from += codes.stride)
      for (std::size_t i = 0; i < kTokens; ++i) sums[i] += table[from[i]];
    for (std::size_t i = 0; i < kTokens; ++i) out[scores_of(at) + i * kQuarter] = scale * sums[i];
  });
}

#endif

}  // namespace HWY_NAMESPACE
}  // namespace veloxquant
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace veloxquant {

HWY_EXPORT(make_scan_tables);
HWY_EXPORT(scan_bytes);
HWY_EXPORT(scan_nibbles);

void make_scan_tables(const float* products, std::size_t codes, std::size_t centroids, ScanTables& tables) {
  HWY_DYNAMIC_DISPATCH(make_scan_tables)(products, codes, centroids, tables);
}

void scan_bytes(const ScanTables& tables, const ScanCodes& codes, float scale, float* scores) {
  HWY_DYNAMIC_DISPATCH(scan_bytes)(tables, codes, scale, scores);
}

void scan_nibbles(const ScanTables& tables, const ScanCodes& codes, float scale, float* scores) {
  HWY_DYNAMIC_DISPATCH(scan_nibbles)(tables, codes, scale, scores);
}

}  // namespace veloxquant
#endif
