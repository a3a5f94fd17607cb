// A point in a model's graph where gradients are read off.
#pragma once

#include "mlx/array.h"
#include "veloxquant/model/device.h"

namespace veloxquant {

/// x itself, whose gradient is also that of `probe`: an array of the same shape, never computed, such as a broadcast zero.
mx::array tap(const mx::array& x, const mx::array& probe);

}  // namespace veloxquant
