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

mx::array Rope::operator()(const mx::array& x, int offset) const {
  if (!own_kernels()) {
    const mx::array wavelengths(wavelengths_.data(), {head_dim_ / 2});
    return mx::fast::rope(x, head_dim_, /* traditional= */ false, std::nullopt, 1.0f, offset, wavelengths);
  }
  return cpu_operation("Rope", {x}, x.shape(), mx::float32,
                       [offset, frequencies = frequencies_](const std::vector<mx::array>& in, mx::array& out) {
                         const auto size = [&](int axis) { return static_cast<std::size_t>(out.shape(axis)); };
                         rope({size(0), size(1), size(2), size(3)}, strided(in[0]), frequencies, offset, mutable_strided(out));
                       });
}

}  // namespace veloxquant
