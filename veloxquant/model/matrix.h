// The large tensors of a model.
#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "mlx/array.h"
#include "veloxquant/model/config.h"
#include "veloxquant/model/device.h"

namespace veloxquant {

/// A matrix as mx::quantize packs it.
struct PackedMatrix {
  mx::array weight, scales;
  std::optional<mx::array> biases;  // affine
  PackingConfig packing;
};

/// In float32.
mx::array restored(const PackedMatrix& packed);

/// An immutable matrix [rows, columns].  Copies share it.
///
/// Our CPU kernels read it in float32: where it lies in the mapped file if it is stored so there, else restored to memory of its
/// own.  MLX's operations read it as it is stored, on a GPU in half precision or packed.  Either form is made when it is first
/// asked for.
class Matrix {
 public:
  /// Row-major; `data` lives as long as `owner`.
  Matrix(std::shared_ptr<const void> owner, const float* data, int rows, int columns);

  /// Of floats.
  explicit Matrix(const mx::array& values);

  explicit Matrix(const PackedMatrix& packed);

  int rows() const { return rows_; }
  int columns() const { return columns_; }

  /// Rows [begin, end).
  Matrix part(int begin, int end) const;

  /// float32, row-major.
  const float* data() const;

  /// x [..., columns] float32 → x·Wᵀ, [..., rows] float32, by MLX's operations.
  mx::array product(const mx::array& x) const;

  /// x [..., rows] float32 → x·W, [..., columns] float32, by MLX's operations.
  mx::array product_back(const mx::array& x) const;

  /// Rows by `indices` [..] → [.., columns] float32, by MLX's operations.
  mx::array take(const mx::array& indices) const;

 private:
  friend class MatrixStack;
  struct Forms;

  const mx::array& array() const;

  Matrix(std::shared_ptr<Forms> forms, int rows, int columns) : forms_(std::move(forms)), rows_(rows), columns_(columns) {}

  std::shared_ptr<Forms> forms_;
  int rows_, columns_;
};

/// Matrices of the same shape one after another, for MLX's gather_mm and gather_qmm.
class MatrixStack {
 public:
  /// At least one.
  explicit MatrixStack(const std::vector<Matrix>& matrices);

  /// x [N, 1, columns], which [N] uint32 → x[n]·W[which[n]]ᵀ, [N, 1, rows].
  mx::array product(const mx::array& x, const mx::array& which) const;

 private:
  std::optional<PackedMatrix> packed_;
  std::optional<mx::array> values_;
};

}  // namespace veloxquant
