// Method "kivi" (arXiv 2402.02750): keys per channel, values per token.
#pragma once

#include "veloxquant/quantize/registry.h"

namespace veloxquant {

/// Evenly spaced levels between the minimum and the maximum of a group of 32: for keys 32 tokens of one channel (the last group of
/// a run may be shorter), for values 32 channels of one token.  Minimum and step are stored as IEEE half. Encoded group of tokens:
/// keys, for each channel minimum and step, then codes [tokens, dim]; values, for each token and each group of channels minimum and
/// step, then the codes of the token; codes of a token packed to whole bytes.
class KiviQuantizer : public Quantizer {
 public:
  KiviQuantizer(Side side, int dim, int bits) : side_(side), dim_(dim), bits_(bits) {}

  int dim() const override { return dim_; }
  int bits() const { return bits_; }
  int token_group() const override;
  std::size_t encoded_bytes(std::size_t tokens) const override;
  void encode(std::span<const float> vectors, std::span<std::uint8_t> encoded) const override;
  void decode(std::span<const std::uint8_t> encoded, std::span<float> vectors) const override;

 private:
  struct Groups;
  Groups groups_of(std::size_t tokens) const;

  Side side_;
  int dim_, bits_;
};

/// The row of quantizer_methods(); widths 1 to 8.
QuantizerMethod kivi_method();

}  // namespace veloxquant
