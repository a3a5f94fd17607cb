#include "veloxquant/kernels/stored_matrix.h"

#include <algorithm>

#include "veloxquant/core/error.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "veloxquant/kernels/stored_matrix.cpp"
// clang-format off
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "veloxquant/kernels/stored_rows-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace veloxquant {
namespace HWY_NAMESPACE {

void restore_part(const StoredMatrix& matrix, std::size_t columns, const MatrixPart& part, float* out) {
  visit_rows(matrix, columns, [&](auto rows) {
    const hn::ScalableTag<float> d;
    const std::size_t lanes = hn::Lanes(d), end = part.column + part.columns, whole = part.column + part.columns / lanes * lanes,
                      open = std::min(whole, rows.open());
    for (std::size_t r = 0; r < part.rows; ++r, out += part.columns) {
      rows.seek(part.row + r, 1);
      const auto row = rows.row(0);
      float* to = out - part.column;
      std::size_t k = part.column;
      for (; k + lanes <= open; k += lanes) hn::StoreU(row.template load<true>(k, row.group(k)), d, to + k);
      for (; k < whole; k += lanes) hn::StoreU(row.template load<false>(k, row.group(k)), d, to + k);
      for (; k < end; ++k) to[k] = row.at(k);
    }
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace veloxquant
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace veloxquant {

HWY_EXPORT(restore_part);

StoredMatrix StoredMatrix::from_row(std::size_t row, std::size_t columns) const {
  StoredMatrix rest = *this;
  const auto skip = [](const void* from, std::size_t bytes) {
    return from ? static_cast<const std::byte*>(from) + bytes : nullptr;
  };
  rest.values = skip(values, row * columns * static_cast<std::size_t>(bits) / 8);
  if (!packed()) return rest;
  const std::size_t groups = row * (columns / group_size), scale_bytes = type != ElementType::kAffine          ? 1
                                                                         : scale_type == ElementType::kFloat32 ? 4
                                                                                                               : 2;
  rest.scales = skip(scales, groups * scale_bytes);
  rest.biases = skip(biases, groups * scale_bytes);
  return rest;
}

void StoredMatrix::check(const char* where, std::size_t columns) const {
  const auto one_of = [](auto value, auto... accepted) { return ((value == accepted) || ...); };
  const bool affine = type == ElementType::kAffine;
  if (!packed()) {
    const int expected = type == ElementType::kFloat32 ? 32 : 16;
    if (bits != expected) throw_invalid(where, "expected elements of {} bits, got {}", expected, bits);
    return;
  }
  if (affine && !one_of(bits, 2, 3, 4, 5, 6, 8)) throw_invalid(where, "expected codes of 2, 3, 4, 5, 6 or 8 bits, got {}", bits);
  if (!affine && bits != (type == ElementType::kMxfp4 ? 4 : 8))
    throw_invalid(where, "expected codes of {} bits, got {}", type == ElementType::kMxfp4 ? 4 : 8, bits);
  if (!(affine ? one_of(group_size, 32u, 64u, 128u) : group_size == 32))
    throw_invalid(where, "expected groups of {}, got {}", affine ? "32, 64 or 128" : "32", group_size);
  if (columns % group_size != 0) throw_invalid(where, "{} columns are no whole groups of {}", columns, group_size);
  if (affine && scale_type >= ElementType::kAffine) throw_invalid(where, "expected scales of float32, float16 or bfloat16");
}

void restore(const StoredMatrix& matrix, std::size_t columns, const MatrixPart& part, float* out) {
  matrix.check("restore", columns);
  if (part.column + part.columns > columns)
    throw_invalid("restore", "expected columns up to {}, got {} to {}", columns, part.column, part.column + part.columns);
  if (matrix.packed() &&
      (part.column % kColumnStep != 0 || (part.columns % kColumnStep != 0 && part.column + part.columns != columns)))
    throw_invalid("restore", "expected columns of a packed matrix in steps of {}, got {} to {}", kColumnStep, part.column,
                  part.column + part.columns);
  HWY_DYNAMIC_DISPATCH(restore_part)(matrix, columns, part, out);
}

}  // namespace veloxquant
#endif
