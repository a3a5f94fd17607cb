// Method "turboquant" (arXiv 2504.19874): a random rotation makes every channel Gaussian, which has known best levels.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

#include "veloxquant/quantize/lloyd_max.h"
#include "veloxquant/quantize/registry.h"

namespace veloxquant {

/// Per token: the norm as IEEE half, then codes of the Lloyd–Max levels of R·x/|x|·√dim, packed.  R is random signs and then a
/// Walsh–Hadamard transform where dim is a power of two, otherwise a random orthogonal matrix.
class TurboQuantizer : public Quantizer {
 public:
  TurboQuantizer(int dim, int bits, std::uint64_t seed);

  int dim() const override { return dim_; }
  int bits() const { return bits_; }
  std::size_t encoded_bytes(std::size_t tokens) const override;
  void encode(std::span<const float> vectors, std::span<std::uint8_t> encoded) const override;
  void decode(std::span<const std::uint8_t> encoded, std::span<float> vectors) const override;

  /// R [dim, dim]: a row vector x is rotated to x·Rᵀ.
  std::vector<float> rotation_matrix() const;

 private:
  struct Rotation {
    std::vector<float> signs;               // [dim], where dim is a power of two
    std::vector<float> matrix, transposed;  // [dim, dim], where it is not
  };

  const Rotation& rotation() const;
  void rotate(std::vector<float>& rows) const;
  void rotate_back(std::span<float> rows) const;

  int dim_, bits_;
  std::uint64_t seed_;
  // Made when it is first needed: a matrix takes seconds, and whoever checks a plan or counts bits needs none.
  mutable std::once_flag made_;
  mutable Rotation rotation_;
};

/// The row of quantizer_methods(); widths 1 to 8.
QuantizerMethod turboquant_method();

}  // namespace veloxquant
