#include "veloxquant/quantize/kivi.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "veloxquant/kernels/bit_packing.h"
#include "veloxquant/quantize/half.h"
#include "veloxquant/quantize/parameters.h"

namespace veloxquant {
namespace {

constexpr std::size_t kGroup = 32;
constexpr std::size_t kRangeBytes = 4;  // of a minimum and a step

std::vector<double> widths(int) {
  return {1, 2, 3, 4, 5, 6, 7, 8};
}

double rate(int dim, double width) {
  const int bits = whole_bits("kivi", dim, width);
  return (KiviQuantizer(Side::kKeys, dim, bits).rate() + KiviQuantizer(Side::kValues, dim, bits).rate()) / 2;
}

QuantizerParameters fit(std::span<const float> vectors, int dim, const FitOptions& options) {
  check_vectors("kivi", vectors, dim);
  return {.method = "kivi",
          .side = options.side,
          .dim = dim,
          .numbers = {{"bits", whole_bits("kivi", dim, options.width)}},
          .tensors = {}};
}

std::unique_ptr<const Quantizer> make(const QuantizerParameters& parameters) {
  expect_parameters(parameters, {"bits"}, {});
  return std::make_unique<KiviQuantizer>(parameters.side, parameters.dim, static_cast<int>(number_in(parameters, "bits", 1, 8)));
}

}  // namespace

// How a run of at most token_group() tokens divides: element (token, channel) belongs to group
// token / tokens_per_group · groups_per_token + channel / channels_per_group.
struct KiviQuantizer::Groups {
  std::size_t tokens_per_group, channels_per_group, groups_per_token, count;

  std::size_t of(std::size_t token, std::size_t channel) const {
    return token / tokens_per_group * groups_per_token + channel / channels_per_group;
  }
};

int KiviQuantizer::token_group() const {
  return side_ == Side::kKeys ? static_cast<int>(kGroup) : 1;
}

KiviQuantizer::Groups KiviQuantizer::groups_of(std::size_t tokens) const {
  const auto dim = static_cast<std::size_t>(dim_);
  if (side_ == Side::kKeys) return {tokens, 1, dim, dim};
  const std::size_t groups = (dim + kGroup - 1) / kGroup;
  return {1, kGroup, groups, groups * tokens};
}

std::size_t KiviQuantizer::encoded_bytes(std::size_t tokens) const {
  const std::size_t runs = side_ == Side::kKeys ? (tokens + kGroup - 1) / kGroup : tokens;
  return runs * groups_of(1).count * kRangeBytes + tokens * packed_bytes(static_cast<std::size_t>(dim_), bits_);
}

void KiviQuantizer::encode(std::span<const float> vectors, std::span<std::uint8_t> encoded) const {
  const auto dim = static_cast<std::size_t>(dim_), run = static_cast<std::size_t>(token_group()), tokens = vectors.size() / dim;
  const auto levels = static_cast<float>((1 << bits_) - 1);
  std::uint8_t* out = encoded.data();
  std::vector<std::uint16_t> codes(dim);
  for (std::size_t first = 0; first < tokens; first += run) {
    const std::size_t count = std::min(run, tokens - first);
    const Groups groups = groups_of(count);
    const auto part = vectors.subspan(first * dim, count * dim);
    std::vector<float> low(groups.count, std::numeric_limits<float>::max()),
        high(groups.count, std::numeric_limits<float>::lowest());
    for (std::size_t i = 0; i < part.size(); ++i) {
      const std::size_t group = groups.of(i / dim, i % dim);
      low[group] = std::min(low[group], part[i]);
      high[group] = std::max(high[group], part[i]);
    }
    for (std::size_t group = 0; group < groups.count; ++group, out += kRangeBytes) {
      store_half(low[group], out);
      low[group] = load_half(out);
      store_half((high[group] - low[group]) / levels, out + 2);
      high[group] = load_half(out + 2);  // from here on the step
    }
    for (std::size_t token = 0; token < count; ++token, out += packed_bytes(dim, bits_)) {
      for (std::size_t i = 0; i < dim; ++i) {
        const std::size_t group = groups.of(token, i);
        const float code = high[group] != 0 ? std::nearbyint((part[token * dim + i] - low[group]) / high[group]) : 0.0f;
        codes[i] = static_cast<std::uint16_t>(std::clamp(code, 0.0f, levels));
      }
      pack_bits(codes, bits_, out);
    }
  }
}

void KiviQuantizer::decode(std::span<const std::uint8_t> encoded, std::span<float> vectors) const {
  const auto dim = static_cast<std::size_t>(dim_), run = static_cast<std::size_t>(token_group()), tokens = vectors.size() / dim;
  const std::uint8_t* in = encoded.data();
  std::vector<std::uint16_t> codes(dim);
  for (std::size_t first = 0; first < tokens; first += run) {
    const std::size_t count = std::min(run, tokens - first);
    const Groups groups = groups_of(count);
    std::vector<float> low(groups.count), step(groups.count);
    for (std::size_t group = 0; group < groups.count; ++group, in += kRangeBytes) {
      low[group] = load_half(in);
      step[group] = load_half(in + 2);
    }
    for (std::size_t token = 0; token < count; ++token, in += packed_bytes(dim, bits_)) {
      unpack_bits(in, bits_, codes);
      for (std::size_t i = 0; i < dim; ++i) {
        const std::size_t group = groups.of(token, i);
        vectors[(first + token) * dim + i] = static_cast<float>(codes[i]) * step[group] + low[group];
      }
    }
  }
}

QuantizerMethod kivi_method() {
  return {"kivi", "any", widths, rate, fit, make, /* least_vectors= */ 0};
}

}  // namespace veloxquant
