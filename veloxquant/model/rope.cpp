#include "veloxquant/model/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "mlx/fast.h"
#include "mlx/ops.h"
#include "veloxquant/kernels/rope.h"
#include "veloxquant/model/cpu_operation.h"

namespace veloxquant {
namespace {

// Meta's rule for Llama 3.1: leave wavelengths that turn often within the original context, stretch those that hardly turn, and
// blend between.
double llama3_wavelength(double wavelength, const RopeConfig& config) {
  const double full_turn = 2 * std::numbers::pi * wavelength;
  const double low = config.original_max_position_embeddings / config.low_freq_factor;
  const double high = config.original_max_position_embeddings / config.high_freq_factor;
  if (full_turn > low) return wavelength * config.factor;
  if (full_turn <= high) return wavelength;
  const double smooth = (config.original_max_position_embeddings / full_turn - config.low_freq_factor) /
                        (config.high_freq_factor - config.low_freq_factor);
  return wavelength / ((1 - smooth) / config.factor + smooth);
}

// YaRN leaves pairs that turn more than beta_fast times within the original context, stretches those that turn less than
// beta_slow times, and blends between, by the pair's index.
double yarn_wavelength(double wavelength, int pair, int dims, const RopeConfig& config) {
  const auto pair_of = [&](double turns) {
    return dims * std::log(config.original_max_position_embeddings / (turns * 2 * std::numbers::pi)) / (2 * std::log(config.theta));
  };
  const double low = std::max(std::floor(pair_of(config.beta_fast)), 0.0),
               high = std::min(std::ceil(pair_of(config.beta_slow)), dims - 1.0);
  const double stretched = std::clamp((pair - low) / (low == high ? 0.001 : high - low), 0.0, 1.0);
  return wavelength / (stretched / config.factor + (1 - stretched));
}

double scaled_wavelength(double wavelength, int pair, int dims, const RopeConfig& config) {
  switch (config.scaling) {
    case RopeConfig::Scaling::kNone:
      break;
    case RopeConfig::Scaling::kLinear:
      return wavelength * config.factor;
    case RopeConfig::Scaling::kLlama3:
      return llama3_wavelength(wavelength, config);
    case RopeConfig::Scaling::kYarn:
      return yarn_wavelength(wavelength, pair, dims, config);
    case RopeConfig::Scaling::kLongRope:
      return wavelength * config.factors.at(static_cast<std::size_t>(pair));
  }
  return wavelength;
}

}  // namespace

Rope::Rope(const RopeConfig& config, int head_dim) : head_dim_(head_dim), magnitude_(static_cast<float>(config.magnitude)) {
  const int dims = config.dims.value_or(head_dim);
  for (int i = 0; i < dims / 2; ++i) {
    const double wavelength = scaled_wavelength(std::pow(config.theta, 2.0 * i / dims), i, dims, config);
    wavelengths_.push_back(static_cast<float>(wavelength));
    frequencies_.push_back(static_cast<float>(1 / wavelength));
  }
}

namespace {

mx::array turn(const mx::array& x, int offset, const std::vector<float>& frequencies, float magnitude) {
  return from_token_major(cpu_operation(
      "Rope", {x}, {token_major_shape(x)},
      [offset, frequencies, magnitude](const auto& in, auto& out) {
        const auto size = [&](int axis) { return static_cast<std::size_t>(in[0].shape(axis)); };
        rope({size(0), size(1), size(2), size(3)}, StridedInput(in[0]).view(), frequencies, magnitude, offset,
             token_major_view(out[0]));
      },
      [offset, frequencies, magnitude](const auto&, const auto&, const auto& gradients, const auto&) {
        auto back = frequencies;
        for (auto& frequency : back) frequency = -frequency;
        return std::vector<mx::array>{turn(from_token_major(gradients[0]), offset, back, magnitude)};
      })[0]);
}

}  // namespace

mx::array Rope::operator()(const mx::array& x, int offset) const {
  if (wavelengths_.empty()) return x;
  if (own_kernels()) return turn(x, offset, frequencies_, magnitude_);
  const int pairs = static_cast<int>(wavelengths_.size());
  const mx::array wavelengths(wavelengths_.data(), {pairs});
  const auto turned = mx::fast::rope(x, 2 * pairs, /* traditional= */ false, std::nullopt, 1.0f, offset, wavelengths);
  if (magnitude_ == 1.0f) return turned;
  std::vector<float> scales(static_cast<std::size_t>(head_dim_), 1.0f);
  std::fill(scales.begin(), scales.begin() + 2 * pairs, magnitude_);
  return mx::multiply(turned, mx::array(scales.data(), {head_dim_}));
}

mx::array Rope::operator()(const mx::array& x, const std::vector<int>& offsets) const {
  if (std::all_of(offsets.begin(), offsets.end(), [&](int offset) { return offset == offsets[0]; }))
    return (*this)(x, offsets.at(0));
  std::vector<mx::array> sequences;
  for (int b = 0; b < x.shape(0); ++b)
    sequences.push_back(
        (*this)(mx::slice(x, {b, 0, 0, 0}, {b + 1, x.shape(1), x.shape(2), x.shape(3)}), offsets.at(static_cast<std::size_t>(b))));
  return mx::concatenate(sequences, 0);
}

}  // namespace veloxquant
