// The operations of a decoder block: our kernels on the CPU, MLX's own on a GPU.
#pragma once

#include <optional>
#include <vector>

#include "mlx/array.h"
#include "veloxquant/model/matrix.h"

namespace veloxquant {

/// Linear maps y = x·Wᵀ + b that share their input x.
class Linear {
 public:
  /// weight [out, in] as checkpoints hold it, bias [out] or none.
  void add(Matrix weight, std::optional<mx::array> bias);

  /// x [..., in] → the outputs of all maps beside each other, [..., Σ out].  `residual` of that shape is added.
  mx::array operator()(const mx::array& x, const std::optional<mx::array>& residual = std::nullopt) const;

  /// x [..., in] → the output of each map, [..., out].
  std::vector<mx::array> parts(const mx::array& x) const;

  /// What a loss gains by x when it gains `gradient` by (*this)(x): [..., Σ out] → [..., in].
  mx::array backward(const mx::array& gradient) const;

 private:
  // So that kernels find what they read; on the thread that builds the graph.
  void prepare() const;

  std::vector<Matrix> weights_;
  std::vector<std::optional<mx::array>> biases_;
};

/// Rows of `table` [rows, dim] by tokens [..] int32 in [0, rows) → [.., dim].
mx::array embed(const Matrix& table, const mx::array& tokens);

/// x / rms(x) · weight over the last axis (arXiv 1910.07467).
mx::array rms_norm(const mx::array& x, const mx::array& weight, float eps);

/// activation(gate) · up of the two maps of gate_up: x [..., in] → [..., out].
mx::array gate(Activation activation, const Linear& gate_up, const mx::array& x);

/// activation(x) by MLX's operations.
mx::array activate(Activation activation, const mx::array& x);

}  // namespace veloxquant
