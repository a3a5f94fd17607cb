// Rows of stored matrices as vectors of float32.  Included once for each target, after Highway.
//
// Each class of rows has the same members: seek(first, count) says which rows come next, row(i) is the i-th of them, group(k) what
// the kGroup columns from k on share, load<kWhole>(k, group) a vector of them from k on, a multiple of the lanes; unless kWhole
// nothing behind the row is read.  Up to column open() it may be.  at(k) is one column, byte(k) the address where it begins,
// row_bytes() the distance of rows.
#if defined(VELOXQUANT_KERNELS_STORED_ROWS_INL_H) == defined(HWY_TARGET_TOGGLE)
#ifdef VELOXQUANT_KERNELS_STORED_ROWS_INL_H
#undef VELOXQUANT_KERNELS_STORED_ROWS_INL_H
#else
#define VELOXQUANT_KERNELS_STORED_ROWS_INL_H
#endif

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "hwy/highway.h"
#include "veloxquant/core/half.h"
#include "veloxquant/kernels/stored_matrix.h"

HWY_BEFORE_NAMESPACE();
namespace veloxquant {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

inline constexpr std::size_t kGroup = 32;

/// float, hwy::float16_t or hwy::bfloat16_t.
template <class T>
class FloatRows {
 public:
  struct Group {};

  struct Row {
    const T* values;

    Group group(std::size_t) const { return {}; }

    template <bool kWhole>
    hn::Vec<hn::ScalableTag<float>> load(std::size_t k, Group) const {
      const hn::ScalableTag<float> d;
      if constexpr (std::is_same_v<T, float>) {
        return hn::LoadU(d, values + k);
      } else {
        return hn::PromoteTo(d, hn::LoadU(hn::Rebind<T, decltype(d)>(), values + k));
      }
    }

    float at(std::size_t k) const {
      if constexpr (std::is_same_v<T, float>) return values[k];
      std::uint16_t bits;
      std::memcpy(&bits, values + k, sizeof(bits));
      return std::is_same_v<T, hwy::float16_t> ? from_half(bits) : from_bfloat(bits);
    }

    const std::uint8_t* byte(std::size_t k) const { return reinterpret_cast<const std::uint8_t*>(values + k); }
  };

  FloatRows(const StoredMatrix& matrix, std::size_t columns) : next_(static_cast<const T*>(matrix.values)), columns_(columns) {}

  void seek(std::size_t first, std::size_t) { first_ = next_ + first * columns_; }
  Row row(std::size_t i) const { return {first_ + i * columns_}; }
  std::size_t open() const { return columns_; }
  std::size_t row_bytes() const { return columns_ * sizeof(T); }

 private:
  const T *next_, *first_ = nullptr;
  std::size_t columns_;
};

#if HWY_TARGET != HWY_SCALAR
// Where the code of each lane stands in the 8 or 16 bytes that a vector of codes is read from, both copied to every block of 16:
// two bytes that hold it, and by how many bits it is shifted there.  With four lanes the second half of eight codes has a table of
// its own, behind the first one's.
template <int kBits>
struct CodePlaces {
  static constexpr std::size_t kLanes = 16;
  alignas(64) std::uint8_t bytes[4 * kLanes];
  alignas(64) std::uint32_t shifts[kLanes];

  constexpr CodePlaces() : bytes(), shifts() {
    for (std::size_t i = 0; i < kLanes; ++i) {
      const std::size_t bit = i * kBits;
      shifts[i] = static_cast<std::uint32_t>(bit % 8);
      bytes[4 * i] = static_cast<std::uint8_t>(bit / 8);
      bytes[4 * i + 1] = bit % 8 + kBits > 8 ? static_cast<std::uint8_t>(bit / 8 + 1) : 0x80;
      bytes[4 * i + 2] = bytes[4 * i + 3] = 0x80;  // a look-up gives zero
    }
  }
};
template <int kBits>
inline constexpr CodePlaces<kBits> kCodePlaces;
#endif

/// kAffine of so many bits, kMxfp4 or kMxfp8.
template <ElementType kType, int kBits>
class PackedRows {
 public:
  using F = hn::ScalableTag<float>;
  using V = hn::Vec<F>;
  static constexpr std::size_t kLanes = hn::MaxLanes(F());
  static_assert(kLanes <= 16, "tables are made for 16 lanes");

  struct Group {
    V scale, bias;
  };

  struct Row {
    const std::uint8_t *codes, *end;
    const float *scales, *biases;
    std::size_t group_shift;

    Group group(std::size_t k) const {
      const V scale = hn::Set(F(), scales[k >> group_shift]);
      return {scale, kType == ElementType::kAffine ? hn::Set(F(), biases[k >> group_shift]) : scale};
    }

    template <bool kWhole>
    V load(std::size_t k, [[maybe_unused]] const Group& group) const {
#if HWY_TARGET == HWY_SCALAR
      return hn::Set(F(), at(k));
#else
      const F d;
      const hn::RebindToUnsigned<F> du;
      const hn::RebindToSigned<F> di;
      const std::size_t half = kLanes == 4 ? k % 8 / 4 : 0;
      const auto places = hn::Load(hn::Repartition<std::uint8_t, F>(), kCodePlaces<kBits>.bytes + 16 * half);
      const auto shifts = hn::Load(du, kCodePlaces<kBits>.shifts + 4 * half);
      const auto spread = hn::BitCast(du, hn::TableLookupBytesOr0(bytes<kWhole>(k), places));
      const auto code = hn::And(hn::Shr(spread, shifts), hn::Set(du, (1u << kBits) - 1));
      if constexpr (kType == ElementType::kAffine) {
        return hn::MulAdd(hn::ConvertTo(d, hn::BitCast(di, code)), group.scale, group.bias);
      } else if constexpr (kType == ElementType::kMxfp4) {
        // Twice the eight magnitudes of E2M1, twice: the sign is set apart, so that there is a minus zero.
        alignas(16) static constexpr std::uint8_t kMagnitudes[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, 1, 2, 3, 4, 6, 8, 12};
        const auto table = hn::LoadDup128(hn::Repartition<std::uint8_t, F>(), kMagnitudes);
        // The other bytes of a lane are codes of zero.
        const auto doubled = hn::BitCast(di, hn::TableLookupBytes(table, hn::BitCast(hn::Repartition<std::uint8_t, F>(), code)));
        const auto sign = hn::BitCast(d, hn::ShiftLeft<28>(hn::And(code, hn::Set(du, 8))));
        return hn::Mul(hn::Or(hn::Mul(hn::ConvertTo(d, doubled), hn::Set(d, 0.5f)), sign), group.scale);
      } else {
        // As the exponent and mantissa of a float32 that is 2^(127 − 7) times too small, subnormal numbers too.
        const auto magnitude = hn::ShiftLeft<20>(hn::And(code, hn::Set(du, 0x7F)));
        const auto sign = hn::ShiftLeft<24>(hn::And(code, hn::Set(du, 0x80)));
        return hn::Mul(hn::Mul(hn::BitCast(d, hn::Or(magnitude, sign)), hn::Set(d, 0x1p120f)), group.scale);
      }
#endif
    }

#if HWY_TARGET == HWY_SCALAR
    float at(std::size_t k) const {
      const std::size_t bit = k * kBits;
      unsigned word = codes[bit / 8];
      if (bit % 8 + kBits > 8) word |= static_cast<unsigned>(codes[bit / 8 + 1]) << 8;
      const unsigned code = word >> bit % 8 & ((1u << kBits) - 1);
      const float scale = scales[k >> group_shift];
      if constexpr (kType == ElementType::kAffine) return static_cast<float>(code) * scale + biases[k >> group_shift];
      if constexpr (kType == ElementType::kMxfp4) {
        static constexpr float kMagnitudes[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
        return (code & 8 ? -kMagnitudes[code & 7] : kMagnitudes[code & 7]) * scale;
      }
      return std::bit_cast<float>((code & 0x7F) << 20 | (code & 0x80) << 24) * 0x1p120f * scale;
    }
#else
    float at(std::size_t) const {
      return 0.0f;
    }  // rows of groups are whole vectors
#endif

    const std::uint8_t* byte(std::size_t k) const {
      return codes + k * kBits / 8;
    }

   private:
#if HWY_TARGET != HWY_SCALAR
    // The bytes that a vector of codes stands in: those of 8 codes, or of 16 where there are as many lanes.
    static constexpr std::size_t kRead = kLanes * kBits > 64 ? 16 : 8;
    friend class PackedRows;

    template <bool kWhole>
    hn::Vec<hn::Repartition<std::uint8_t, F>> bytes(std::size_t k) const {
      const hn::Repartition<std::uint8_t, F> d8;
      const std::uint8_t* from = codes + k / 8 * kBits;
      if constexpr (kRead == 16) {
        if (kWhole) return hn::LoadDup128(d8, from);
        alignas(16) std::uint8_t left[16] = {};
        std::memcpy(left, from, std::min<std::size_t>(16, static_cast<std::size_t>(end - from)));
        return hn::LoadDup128(d8, left);
      } else {
        std::uint64_t word = 0;
        std::memcpy(&word, from, kWhole ? 8 : std::min<std::size_t>(8, static_cast<std::size_t>(end - from)));
        return hn::BitCast(d8, hn::Set(hn::Repartition<std::uint64_t, F>(), word));
      }
    }
#endif
  };

  PackedRows(const StoredMatrix& matrix, std::size_t columns)
      : matrix_(matrix),
        groups_(columns / matrix.group_size),
        row_bytes_(columns * kBits / 8),
        group_shift_(static_cast<std::size_t>(std::countr_zero(matrix.group_size))) {}

  void seek(std::size_t first, std::size_t count) {
    first_ = first;
    take(matrix_.scales, first * groups_, count * groups_, scales_);
    if (kType == ElementType::kAffine) take(matrix_.biases, first * groups_, count * groups_, biases_);
  }

  Row row(std::size_t i) const {
    const auto* codes = static_cast<const std::uint8_t*>(matrix_.values) + (first_ + i) * row_bytes_;
    return {codes, codes + row_bytes_, scales_.data() + i * groups_, biases_.data() + i * groups_, group_shift_};
  }

  std::size_t row_bytes() const {
    return row_bytes_;
  }

  std::size_t open() const {
#if HWY_TARGET == HWY_SCALAR
    return groups_ << group_shift_;
#else
    return row_bytes_ < Row::kRead ? 0 : ((row_bytes_ - Row::kRead) / kBits * 8 + 8) / kLanes * kLanes;
#endif
  }

 private:
  // Scales or biases from the `begin`-th on.
  void take(const void* from, std::size_t begin, std::size_t count, std::vector<float>& to) const {
    to.resize(std::max(to.size(), count));
    if constexpr (kType == ElementType::kAffine) {
      if (matrix_.scale_type == ElementType::kFloat32) std::copy_n(static_cast<const float*>(from) + begin, count, to.data());
      if (matrix_.scale_type == ElementType::kFloat16) convert(static_cast<const hwy::float16_t*>(from) + begin, count, to.data());
      if (matrix_.scale_type == ElementType::kBfloat16)
        convert(static_cast<const hwy::bfloat16_t*>(from) + begin, count, to.data());
    } else {
      const auto power = [](std::uint32_t exponent) { return std::bit_cast<float>(exponent == 0 ? 1u << 22 : exponent << 23); };
      std::transform(static_cast<const std::uint8_t*>(from) + begin, static_cast<const std::uint8_t*>(from) + begin + count,
                     to.data(), power);
    }
  }

  template <class T>
  static void convert(const T* from, std::size_t count, float* to) {
    const typename FloatRows<T>::Row row{from};
    std::size_t i = 0;
    for (; i + kLanes <= count; i += kLanes) hn::StoreU(row.template load<true>(i, {}), F(), to + i);
    for (; i < count; ++i) to[i] = row.at(i);
  }

  StoredMatrix matrix_;
  std::size_t groups_, row_bytes_, group_shift_, first_ = 0;
  std::vector<float> scales_, biases_;  // of the rows that were sought
};

/// visit(rows) with the rows of a matrix.
template <class Visit>
void visit_rows(const StoredMatrix& matrix, std::size_t columns, Visit visit) {
  switch (matrix.type) {
    case ElementType::kFloat32:
      return visit(FloatRows<float>(matrix, columns));
    case ElementType::kFloat16:
      return visit(FloatRows<hwy::float16_t>(matrix, columns));
    case ElementType::kBfloat16:
      return visit(FloatRows<hwy::bfloat16_t>(matrix, columns));
    case ElementType::kMxfp4:
      return visit(PackedRows<ElementType::kMxfp4, 4>(matrix, columns));
    case ElementType::kMxfp8:
      return visit(PackedRows<ElementType::kMxfp8, 8>(matrix, columns));
    case ElementType::kAffine:
      break;
  }
  switch (matrix.bits) {
    case 2:
      return visit(PackedRows<ElementType::kAffine, 2>(matrix, columns));
    case 3:
      return visit(PackedRows<ElementType::kAffine, 3>(matrix, columns));
    case 4:
      return visit(PackedRows<ElementType::kAffine, 4>(matrix, columns));
    case 5:
      return visit(PackedRows<ElementType::kAffine, 5>(matrix, columns));
    case 6:
      return visit(PackedRows<ElementType::kAffine, 6>(matrix, columns));
    default:
      return visit(PackedRows<ElementType::kAffine, 8>(matrix, columns));
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace veloxquant
HWY_AFTER_NAMESPACE();

#endif
