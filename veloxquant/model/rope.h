// Rotary position embedding.
#pragma once

#include <vector>

#include "mlx/array.h"
#include "veloxquant/model/config.h"
#include "veloxquant/model/device.h"

namespace veloxquant {

/// Turns dimension pairs (i, i + n/2) of the first n of a vector at position p by p / wavelength[i]: RoFormer (arXiv 2104.09864),
/// with positions divided by a factor ("linear", arXiv 2306.15595), slow frequencies divided by it ("llama3", arXiv 2407.21783;
/// "yarn", arXiv 2309.00071) or each by its own ("longrope", arXiv 2402.13753); the last two also lengthen what is turned.  The
/// other dimensions stay as they are.
class Rope {
 public:
  Rope(const RopeConfig& config, int head_dim);

  /// x [B, H, T, D], token t at position offset + t → the same shape.
  mx::array operator()(const mx::array& x, int offset) const;

  /// The same where token t of sequence b is at position offsets[b] + t.
  mx::array operator()(const mx::array& x, const std::vector<int>& offsets) const;

  /// Radians per position of each pair that turns, [n/2], and by what the pairs are multiplied as well.
  const std::vector<float>& frequencies() const { return frequencies_; }
  float magnitude() const { return magnitude_; }

  /// Positions per radian of each dimension pair that turns, [n/2].
  const std::vector<float>& wavelengths() const { return wavelengths_; }

 private:
  int head_dim_;
  float magnitude_;
  std::vector<float> wavelengths_;
  std::vector<float> frequencies_;  // 1 / wavelengths
};

}  // namespace veloxquant
