// Method "affine": evenly spaced levels over groups of channels, as mx.quantize has them.
#pragma once

#include "veloxquant/quantize/registry.h"

namespace veloxquant {

/// Per token, groups of group_size channels (the last may be shorter) are stored as code · scale + bias.  The scale is chosen as by
/// mx.quantize: the end of the larger magnitude is exact, and zero falls on a level.  Scale and bias are stored as IEEE half; codes
/// are rounded with the stored values. Encoded token: for each group scale and bias (2 + 2 bytes), then the codes of all channels,
/// packed.
class AffineQuantizer : public Quantizer {
 public:
  AffineQuantizer(int dim, int bits, int group_size) : dim_(dim), bits_(bits), group_size_(group_size) {}

  int dim() const override { return dim_; }
  int bits() const { return bits_; }
  int group_size() const { return group_size_; }
  std::size_t encoded_bytes(std::size_t tokens) const override;
  void encode(std::span<const float> vectors, std::span<std::uint8_t> encoded) const override;
  void decode(std::span<const std::uint8_t> encoded, std::span<float> vectors) const override;

 private:
  int groups() const { return (dim_ + group_size_ - 1) / group_size_; }

  int dim_, bits_, group_size_;
};

/// The row of quantizer_methods(); groups of 64 channels, widths 1 to 8.
QuantizerMethod affine_method();

}  // namespace veloxquant
