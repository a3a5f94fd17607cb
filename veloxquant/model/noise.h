// Gaussian noise on arrays of a model's graph.
#pragma once

#include <cstdint>

#include "mlx/array.h"
#include "veloxquant/model/device.h"

namespace veloxquant {

/// x [B, H, T, D] with noise of this standard deviation: the same on every device, to float precision (kernels/gaussian_noise.h).
mx::array add_gaussian_noise(const mx::array& x, float deviation, std::uint64_t seed);

}  // namespace veloxquant
