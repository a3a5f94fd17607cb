#include <bit>
#include <cmath>

#include "veloxquant/core/half.h"
#include "veloxquant/kernels/stored_matrix.h"

namespace veloxquant::reference {
namespace {

double number(ElementType type, const void* values, std::size_t i) {
  if (type == ElementType::kFloat32) return static_cast<const float*>(values)[i];
  const std::uint16_t bits = static_cast<const std::uint16_t*>(values)[i];
  return type == ElementType::kFloat16 ? from_half(bits) : from_bfloat(bits);
}

unsigned code_at(const StoredMatrix& matrix, std::size_t columns, std::size_t row, std::size_t column) {
  const auto* bytes = static_cast<const std::uint8_t*>(matrix.values);
  const auto width = static_cast<std::size_t>(matrix.bits);
  unsigned code = 0;
  for (std::size_t b = 0; b < width; ++b) {
    const std::size_t bit = (row * columns + column) * width + b;
    code |= (bytes[bit / 8] >> bit % 8 & 1u) << b;
  }
  return code;
}

// A small float: its sign, exponent and mantissa, of which a field of zeros in the exponent means a subnormal number.
double small_float(unsigned code, int exponent_bits, int mantissa_bits) {
  const int exponent = static_cast<int>(code >> mantissa_bits & ((1u << exponent_bits) - 1)), bias = (1 << (exponent_bits - 1)) - 1;
  const double fraction = static_cast<double>(code & ((1u << mantissa_bits) - 1)) / (1 << mantissa_bits);
  const double magnitude = exponent == 0 ? std::ldexp(fraction, 1 - bias) : std::ldexp(1 + fraction, exponent - bias);
  return code >> (exponent_bits + mantissa_bits) & 1 ? -magnitude : magnitude;
}

double element(const StoredMatrix& matrix, std::size_t columns, std::size_t row, std::size_t column) {
  if (!matrix.packed()) return number(matrix.type, matrix.values, row * columns + column);
  const unsigned code = code_at(matrix, columns, row, column);
  const std::size_t group = row * (columns / matrix.group_size) + column / matrix.group_size;
  if (matrix.type == ElementType::kAffine)
    return number(matrix.scale_type, matrix.scales, group) * code + number(matrix.scale_type, matrix.biases, group);
  const double scale = std::ldexp(1.0, static_cast<const std::uint8_t*>(matrix.scales)[group] - 127);
  return scale * (matrix.type == ElementType::kMxfp4 ? small_float(code, 2, 1) : small_float(code, 4, 3));
}

}  // namespace

void restore(const StoredMatrix& matrix, std::size_t columns, const MatrixPart& part, float* out) {
  for (std::size_t r = 0; r < part.rows; ++r)
    for (std::size_t c = 0; c < part.columns; ++c)
      *out++ = static_cast<float>(element(matrix, columns, part.row + r, part.column + c));
}

}  // namespace veloxquant::reference
