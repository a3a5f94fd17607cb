// The operations of a decoder block: our kernels on the CPU, MLX's own on a GPU.
#pragma once

#include <optional>

#include "mlx/array.h"

namespace veloxquant {

namespace mx = mlx::core;

/// A linear map y = x·Wᵀ + b; weight [out, in] as checkpoints hold it, bias [out] or none.
struct Linear {
  mx::array weight;
  std::optional<mx::array> bias;

  /// x [..., in] → [..., out].
  mx::array operator()(const mx::array& x) const;
};

/// x / rms(x) · weight over the last axis (arXiv 1910.07467).
mx::array rms_norm(const mx::array& x, const mx::array& weight, float eps);

/// silu(gate) · up of gate and up joined along the last axis: [..., 2·d] → [..., d].
mx::array silu_gate(const mx::array& joined);

}  // namespace veloxquant
