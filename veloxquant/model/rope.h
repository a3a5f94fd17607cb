// Rotary position embedding.
#pragma once

#include <vector>

#include "mlx/array.h"
#include "veloxquant/model/config.h"
#include "veloxquant/model/device.h"

namespace veloxquant {

/// Turns dimension pairs (i, i + D/2) of a vector at position p by p / wavelength[i]: RoFormer (arXiv 2104.09864), with positions
/// divided by a factor ("linear", arXiv 2306.15595) or slow frequencies divided by it ("llama3", arXiv 2407.21783).
class Rope {
 public:
  Rope(const RopeConfig& config, int head_dim);

  /// x [B, H, T, D], token t at position offset + t → the same shape.
  mx::array operator()(const mx::array& x, int offset) const;

  /// Positions per radian of each dimension pair, [D/2].
  const std::vector<float>& wavelengths() const { return wavelengths_; }

 private:
  int head_dim_;
  std::vector<float> wavelengths_;
  std::vector<float> frequencies_;  // 1 / wavelengths
};

}  // namespace veloxquant
