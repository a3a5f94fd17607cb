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
// token · groups_per_token + of_channel[channel].
struct KiviQuantizer::Groups {
  std::size_t groups_per_token, count;  // keys: 0 per token, since a group spans them
  std::vector<std::size_t> of_channel;
};

int KiviQuantizer::token_group() const {
  return side_ == Side::kKeys ? static_cast<int>(kGroup) : 1;
}

KiviQuantizer::Groups KiviQuantizer::groups_of(std::size_t tokens) const {
  Groups groups{0, 0, std::vector<std::size_t>(static_cast<std::size_t>(dim_))};
  for (std::size_t i = 0; i < groups.of_channel.size(); ++i) groups.of_channel[i] = side_ == Side::kKeys ? i : i / kGroup;
  const std::size_t per_run = groups.of_channel.back() + 1;
  groups.groups_per_token = side_ == Side::kKeys ? 0 : per_run;
  groups.count = side_ == Side::kKeys ? per_run : per_run * tokens;
  return groups;
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
    for (std::size_t token = 0; token < count; ++token) {
      for (std::size_t i = 0; i < dim; ++i) {
        const std::size_t group = token * groups.groups_per_token + groups.of_channel[i];
        low[group] = std::min(low[group], part[token * dim + i]);
        high[group] = std::max(high[group], part[token * dim + i]);
      }
    }
    for (std::size_t group = 0; group < groups.count; ++group, out += kRangeBytes) {
      store_half(low[group], out);
      low[group] = load_half(out);
      store_half((high[group] - low[group]) / levels, out + 2);
      high[group] = load_half(out + 2);  // from here on the step
    }
    for (std::size_t token = 0; token < count; ++token, out += packed_bytes(dim, bits_)) {
      for (std::size_t i = 0; i < dim; ++i) {
        const std::size_t group = token * groups.groups_per_token + groups.of_channel[i];
        const float code = high[group] != 0 ? (part[token * dim + i] - low[group]) / high[group] : 0.0f;
        codes[i] = static_cast<std::uint16_t>(std::lrint(std::clamp(code, 0.0f, levels)));
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
        const std::size_t group = token * groups.groups_per_token + groups.of_channel[i];
        vectors[(first + token) * dim + i] = static_cast<float>(codes[i]) * step[group] + low[group];
      }
    }
  }
}

QuantizerMethod kivi_method() {
  return {"kivi", "any", widths, rate, fit, make, /* least_vectors= */ 0};
}

}  // namespace veloxquant
