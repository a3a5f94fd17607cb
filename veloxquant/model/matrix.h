// The large tensors of a model.
#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "mlx/array.h"
#include "veloxquant/model/device.h"

namespace veloxquant {

/// An immutable float32 matrix [rows, columns], row-major.  Our CPU kernels read it where it lies: in the mapped file if it is
/// stored as float32 there, else in memory of its own.  Copies share it.
class Matrix {
 public:
  /// `data` lives as long as `owner`.
  Matrix(std::shared_ptr<const void> owner, const float* data, int rows, int columns);

  const float* data() const { return data_; }
  int rows() const { return rows_; }
  int columns() const { return columns_; }

  /// As an array of MLX's, for its operations: a copy, made once.
  const mx::array& array() const;

 private:
  struct Copy {
    std::once_flag made;
    std::optional<mx::array> array;
  };

  std::shared_ptr<const void> owner_;
  const float* data_;
  int rows_, columns_;
  std::shared_ptr<Copy> copy_;
};

}  // namespace veloxquant
