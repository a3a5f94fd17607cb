#include "veloxquant/model/noise.h"

#include <numbers>

#include "mlx/ops.h"
#include "veloxquant/core/error.h"
#include "veloxquant/kernels/gaussian_noise.h"
#include "veloxquant/model/cpu_operation.h"

namespace veloxquant {
namespace {

mx::array number(std::uint32_t value) {
  return mx::array(value, mx::uint32);
}

mx::array finalise(mx::array h) {
  h = mx::bitwise_xor(h, mx::right_shift(h, number(16)));
  h = mx::multiply(h, number(0x85EBCA6B));
  h = mx::bitwise_xor(h, mx::right_shift(h, number(13)));
  h = mx::multiply(h, number(0xC2B2AE35));
  return mx::bitwise_xor(h, mx::right_shift(h, number(16)));
}

mx::array noise_graph(const mx::array& x, std::uint64_t seed) {
  const auto place = mx::multiply(mx::arange(0.0, static_cast<double>(x.size()), 1.0, mx::uint32), number(kNoiseStride));
  const auto hash = [&](int n) { return finalise(mx::add(place, number(noise_salt(seed, n)))); };
  const auto uniform =
      mx::add(mx::multiply(mx::astype(mx::right_shift(hash(1), number(8)), mx::float32), mx::array(0x1p-24f)), mx::array(0x1p-25f));
  const auto angle = mx::multiply(mx::astype(mx::view(hash(2), mx::int32), mx::float32),
                                  mx::array(static_cast<float>(2 * std::numbers::pi * 0x1p-32)));
  return mx::reshape(mx::multiply(mx::sqrt(mx::multiply(mx::array(-2.0f), mx::log(uniform))), mx::cos(angle)), x.shape());
}

}  // namespace

mx::array add_gaussian_noise(const mx::array& x, float deviation, std::uint64_t seed) {
  if (x.size() >= std::size_t{1} << 32) throw_invalid("noise", "expected fewer than 2^32 elements, got {}", x.size());
  if (!own_kernels()) return mx::add(x, mx::multiply(mx::array(deviation), noise_graph(x, seed)));
  return cpu_operation("GaussianNoise", {mx::contiguous(x)}, {x.shape()}, [deviation, seed](const auto& in, auto& out) {
    add_gaussian_noise(in[0].template data<float>(), in[0].size(), deviation, seed, out[0].template data<float>());
  })[0];
}

}  // namespace veloxquant
