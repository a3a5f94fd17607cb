#include "veloxquant/quantize/affine.h"

#include <algorithm>
#include <cmath>

#include "veloxquant/kernels/bit_packing.h"
#include "veloxquant/quantize/half.h"
#include "veloxquant/quantize/parameters.h"

namespace veloxquant {
namespace {

constexpr int kGroupSize = 64;
constexpr std::size_t kScaleBytes = 4;  // of a scale and a bias

struct ScaleAndBias {
  float scale, bias;
};

ScaleAndBias choose(std::span<const float> group, int bits) {
  const auto levels = static_cast<float>((1 << bits) - 1);
  const auto [low, high] = std::minmax_element(group.begin(), group.end());
  const bool low_is_larger = std::abs(*low) > std::abs(*high);
  float scale = std::max((*high - *low) / levels, 1e-7f);
  if (!low_is_larger) scale = -scale;
  const float edge = low_is_larger ? *low : *high;
  const float zero_code = std::nearbyint(edge / scale);
  if (zero_code == 0) return {scale, 0.0f};
  return {edge / zero_code, edge};
}

std::vector<double> widths(int) {
  return {1, 2, 3, 4, 5, 6, 7, 8};
}

double rate(int dim, double width) {
  return AffineQuantizer(dim, whole_bits("affine", dim, width), kGroupSize).rate();
}

QuantizerParameters fit(std::span<const float> vectors, int dim, const FitOptions& options) {
  check_vectors("affine", vectors, dim);
  const int bits = whole_bits("affine", dim, options.width);
  return {
      .method = "affine", .side = options.side, .dim = dim, .numbers = {{"bits", bits}, {"group_size", kGroupSize}}, .tensors = {}};
}

std::unique_ptr<const Quantizer> make(const QuantizerParameters& parameters) {
  expect_parameters(parameters, {"bits", "group_size"}, {});
  return std::make_unique<AffineQuantizer>(parameters.dim, static_cast<int>(number_in(parameters, "bits", 1, 8)),
                                           static_cast<int>(number_in(parameters, "group_size", 1, 65536)));
}

}  // namespace

std::size_t AffineQuantizer::encoded_bytes(std::size_t tokens) const {
  return tokens * (static_cast<std::size_t>(groups()) * kScaleBytes + packed_bytes(static_cast<std::size_t>(dim_), bits_));
}

void AffineQuantizer::encode(std::span<const float> vectors, std::span<std::uint8_t> encoded) const {
  const auto dim = static_cast<std::size_t>(dim_), group_size = static_cast<std::size_t>(group_size_);
  const auto levels = static_cast<float>((1 << bits_) - 1);
  std::vector<std::uint16_t> codes(dim);
  std::uint8_t* out = encoded.data();
  for (std::size_t token = 0; token < vectors.size() / dim; ++token) {
    const auto row = vectors.subspan(token * dim, dim);
    for (std::size_t begin = 0; begin < dim; begin += group_size) {
      const auto group = row.subspan(begin, std::min(group_size, dim - begin));
      auto [scale, bias] = choose(group, bits_);
      store_half(scale, out);
      store_half(bias, out + 2);
      scale = load_half(out);
      bias = load_half(out + 2);
      out += kScaleBytes;
      for (std::size_t i = 0; i < group.size(); ++i) {
        const float code = scale == 0 ? 0.0f : (group[i] - bias) / scale;
        codes[begin + i] = static_cast<std::uint16_t>(std::lrint(std::clamp(code, 0.0f, levels)));
      }
    }
    pack_bits(codes, bits_, out);
    out += packed_bytes(dim, bits_);
  }
}

void AffineQuantizer::decode(std::span<const std::uint8_t> encoded, std::span<float> vectors) const {
  const auto dim = static_cast<std::size_t>(dim_), group_size = static_cast<std::size_t>(group_size_);
  std::vector<std::uint16_t> codes(dim);
  const std::uint8_t* in = encoded.data();
  for (std::size_t token = 0; token < vectors.size() / dim; ++token) {
    const std::uint8_t* scales = in;
    in += static_cast<std::size_t>(groups()) * kScaleBytes;
    unpack_bits(in, bits_, codes);
    in += packed_bytes(dim, bits_);
    for (std::size_t begin = 0; begin < dim; begin += group_size, scales += kScaleBytes) {
      const float scale = load_half(scales), bias = load_half(scales + 2);
      for (std::size_t i = begin; i < std::min(begin + group_size, dim); ++i)
        vectors[token * dim + i] = static_cast<float>(codes[i]) * scale + bias;
    }
  }
}

QuantizerMethod affine_method() {
  return {"affine", "any", widths, rate, fit, make, /* least_vectors= */ 0};
}

}  // namespace veloxquant
