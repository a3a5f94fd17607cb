// The large tensors of a model.
#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "mlx/array.h"
#include "veloxquant/kernels/stored_matrix.h"
#include "veloxquant/model/config.h"
#include "veloxquant/model/device.h"

namespace veloxquant {

/// A matrix as mx::quantize packs it.
struct PackedMatrix {
  mx::array weight, scales;
  std::optional<mx::array> biases;  // affine
  PackingConfig packing;
};

/// How our kernels call such a packing.
ElementType type_of(const PackingConfig& packing);

/// In float32.
mx::array restored(const PackedMatrix& packed);

/// Products of at most so many tokens, as when text is written token by token, only wait for their weights, and MLX's operations
/// make them in the precision in which these are stored.  Those of more are what is measured: in float32, since activations rounded
/// to bfloat16 alone change a model by more than the storage that is measured does.
inline constexpr int kFewTokens = 64;

/// Products of few tokens are in float32 too for its life: for measuring what is read a few tokens at a time.
class Float32Scope {
 public:
  Float32Scope();
  ~Float32Scope();
  Float32Scope(const Float32Scope&) = delete;
  Float32Scope& operator=(const Float32Scope&) = delete;
};

/// Whether MLX's operations make a product of `tokens` in float32.
bool in_float32(std::size_t tokens);

/// An immutable matrix [rows, columns].  Copies share it.
///
/// Our CPU kernels read it as it is stored, where it lies in the mapped file if it comes from one.  So do MLX's operations on a
/// GPU, in half precision or packed; those of the CPU read what was mapped from a file in float32.
class Matrix {
 public:
  /// `stored` lives as long as `owner`.  Throws std::invalid_argument for a form that cannot be.
  Matrix(std::shared_ptr<const void> owner, const StoredMatrix& stored, int rows, int columns);

  /// Of floats.
  explicit Matrix(const mx::array& values);

  explicit Matrix(const PackedMatrix& packed);

  int rows() const { return rows_; }
  int columns() const { return columns_; }

  /// Rows [begin, end).
  Matrix part(int begin, int end) const;

  /// What our kernels read; as long as a copy of this matrix lives.  The first call may evaluate arrays.
  const StoredMatrix& stored() const;

  /// [rows, columns], in memory of its own.
  std::vector<float> floats() const;

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

  /// What our kernels read of the i-th; see Matrix::stored.
  StoredMatrix stored(int i) const;

  /// x [N, 1, columns] float32, which [N] uint32 → x[n]·W[which[n]]ᵀ, [N, 1, rows] float32, by MLX's operations.  `many`: in
  /// float32 (in_float32()); `which` is then ascending.
  mx::array product(const mx::array& x, const mx::array& which, bool many) const;

 private:
  struct Forms;

  const Matrix& joined() const;
  mx::array gathered(const mx::array& x, const mx::array& which, bool many, bool transposed) const;

  std::shared_ptr<Forms> forms_;
  int count_, rows_, columns_;
};

}  // namespace veloxquant
