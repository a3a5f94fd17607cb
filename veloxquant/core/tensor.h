// Plain arrays with a shape, for what passes between files, quantizers and plans.
#pragma once

#include <cstdint>
#include <vector>

namespace veloxquant {

/// Row-major; `values.size()` is the product of `shape`.
struct Tensor {
  std::vector<std::int64_t> shape;
  std::vector<float> values;

  bool operator==(const Tensor&) const = default;
};

/// The same of bytes.
struct ByteTensor {
  std::vector<std::int64_t> shape;
  std::vector<std::uint8_t> values;

  bool operator==(const ByteTensor&) const = default;
};

}  // namespace veloxquant
