#include "veloxquant/model/rope.h"

#include <cmath>
#include <numbers>

#include "mlx/fast.h"
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

}  // namespace

Rope::Rope(const RopeConfig& config, int head_dim) : head_dim_(head_dim) {
  for (int i = 0; i < head_dim / 2; ++i) {
    double wavelength = std::pow(config.theta, 2.0 * i / head_dim);
    if (config.scaling == RopeConfig::Scaling::kLinear) wavelength *= config.factor;
    if (config.scaling == RopeConfig::Scaling::kLlama3) wavelength = llama3_wavelength(wavelength, config);
    wavelengths_.push_back(static_cast<float>(wavelength));
    frequencies_.push_back(static_cast<float>(1 / wavelength));
  }
}

namespace {

mx::array turn(const mx::array& x, int offset, const std::vector<float>& frequencies) {
  return from_token_major(cpu_operation(
      "Rope", {x}, {token_major_shape(x)},
      [offset, frequencies](const auto& in, auto& out) {
        const auto size = [&](int axis) { return static_cast<std::size_t>(in[0].shape(axis)); };
        rope({size(0), size(1), size(2), size(3)}, StridedInput(in[0]).view(), frequencies, offset, token_major_view(out[0]));
      },
      [offset, frequencies](const auto&, const auto&, const auto& gradients, const auto&) {
        auto back = frequencies;
        for (auto& frequency : back) frequency = -frequency;
        return std::vector<mx::array>{turn(from_token_major(gradients[0]), offset, back)};
      })[0]);
}

}  // namespace

mx::array Rope::operator()(const mx::array& x, int offset) const {
  if (own_kernels()) return turn(x, offset, frequencies_);
  const mx::array wavelengths(wavelengths_.data(), {head_dim_ / 2});
  return mx::fast::rope(x, head_dim_, /* traditional= */ false, std::nullopt, 1.0f, offset, wavelengths);
}

}  // namespace veloxquant
