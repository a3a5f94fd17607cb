// Matrices of weights as files store them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace veloxquant {

/// The type of a matrix's elements.  Of the packed ones, as mx::quantize writes them, a group of neighbouring elements of a row
/// shares a scale; codes stand one after another, the lowest bits of the lowest byte first.
enum class ElementType : std::uint8_t {
  kFloat32,
  kFloat16,
  kBfloat16,
  kAffine,  // codes of 2, 3, 4, 5, 6 or 8 bits: scale · code + bias
  kMxfp4,   // E2M1 by a scale 2^(s − 127)
  kMxfp8,   // E4M3 by the same
};

/// A row-major matrix [rows, columns] that somebody else holds.  Its elements are finite; `columns` are whole groups.
struct StoredMatrix {
  ElementType type = ElementType::kFloat32;
  const void* values = nullptr;  // elements, aligned to their size; of packed ones the codes, columns · bits / 8 bytes a row
  int bits = 32;                 // of an element or code
  std::size_t group_size = 0;    // packed: 32, 64 or 128
  ElementType scale_type = ElementType::kFloat32;  // kAffine: of scales and biases, one of the first three
  // [rows, columns / group_size], aligned to their size; kMxfp4 and kMxfp8: bytes, and no biases
  const void* scales = nullptr;
  const void* biases = nullptr;

  StoredMatrix() = default;
  StoredMatrix(const float* floats) : values(floats) {}  // NOLINT: a float32 matrix is its array
  /// One of the first three types.
  StoredMatrix(ElementType floats, const void* elements)
      : type(floats), values(elements), bits(floats == ElementType::kFloat32 ? 32 : 16) {}

  bool packed() const { return type >= ElementType::kAffine; }

  /// The same from row `row` on.
  StoredMatrix from_row(std::size_t row, std::size_t columns) const;

  /// Throws std::invalid_argument, naming `where`, unless rows of so many columns can be stored so.
  void check(const char* where, std::size_t columns) const;
};

/// Some rows and columns of a matrix.
struct MatrixPart {
  std::size_t row, rows, column, columns;
};

/// Columns of a part of a packed matrix begin at a multiple of this, and end at one or at the row's end.
inline constexpr std::size_t kColumnStep = 128;

/// Elements of a part in float32, out [part.rows, part.columns].  columns: those of the matrix.
void restore(const StoredMatrix& matrix, std::size_t columns, const MatrixPart& part, float* out);

namespace reference {
void restore(const StoredMatrix& matrix, std::size_t columns, const MatrixPart& part, float* out);
}  // namespace reference

}  // namespace veloxquant
