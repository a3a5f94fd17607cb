// Arrays of MLX as entries of safetensors files, and back.
#pragma once

#include <string>

#include "mlx/array.h"
#include "veloxquant/core/safetensors.h"
#include "veloxquant/model/device.h"

namespace veloxquant {

/// Evaluated, row-major, in memory that the CPU reads.
mx::array on_cpu(const mx::array& array);

/// Such an array, of zeros.
mx::array array_of_zeros(const mx::Shape& shape, mx::Dtype type);

/// What such an array is in a file; its data is the array's.  Types that files do not have keep MLX's names.
SafetensorsEntry as_entry(const mx::array& array);

/// A copy, which may still have to be evaluated.  Throws std::runtime_error that names `tensor` and `source` for a type that MLX
/// does not have, or sizes beyond 2^31.
mx::array as_array(const SafetensorsEntry& entry, const std::string& tensor, const std::string& source);

}  // namespace veloxquant
