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

/// Products of at most so many tokens, as when text is written token by token, only wait for their weights, and MLX's operations
/// make them in the precision in which these are stored.  Those of more are what is measured: in float32, since activations rounded
/// to bfloat16 alone change a model by more than the storage that is measured does.
inline constexpr int kFewTokens = 64;

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

/// Matrices [rows, columns] of the same shape.  Copies share them.
///
/// Our CPU kernels read them one by one, where each lies; MLX's operations gather them from one array, which on a GPU is made at
/// once and is then all that there is.
class MatrixStack {
 public:
  /// At least one.
  explicit MatrixStack(std::vector<Matrix> matrices);

  /// `count` of them one after another, [count * rows, columns].
  MatrixStack(Matrix joined, int count);

  int count() const { return count_; }
  int rows() const { return rows_; }
  int columns() const { return columns_; }

  /// The i-th in float32, row-major.
  const float* data(int i) const;

  /// x [N, 1, columns] float32, which [N] uint32 → x[n]·W[which[n]]ᵀ, [N, 1, rows] float32, by MLX's operations.  `many`: for more
  /// than kFewTokens; `which` is then ascending.
  mx::array product(const mx::array& x, const mx::array& which, bool many) const;

 private:
  struct Forms;

  const Matrix& joined() const;
  mx::array gathered(const mx::array& x, const mx::array& which, bool many, bool transposed) const;

  std::shared_ptr<Forms> forms_;
  int count_, rows_, columns_;
};

}  // namespace veloxquant
