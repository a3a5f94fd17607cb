#include <vector>

#include "veloxquant/kernels/linear.h"

namespace veloxquant::reference {
namespace {

std::size_t total_out(std::span<const LinearMap> maps) {
  std::size_t total = 0;
  for (const auto& map : maps) total += map.out;
  return total;
}

// The weight of each map [out, in].
std::vector<std::vector<float>> restored(std::span<const LinearMap> maps, std::size_t in) {
  std::vector<std::vector<float>> weights;
  for (const auto& map : maps) {
    weights.emplace_back(map.out * in);
    reference::restore(map.weight, in, {0, map.out, 0, in}, weights.back().data());
  }
  return weights;
}

}  // namespace

void linear(const float* x, std::size_t rows, std::size_t in, std::span<const LinearMap> maps, const float* residual, float* y) {
  const auto weights = restored(maps, in);
  for (std::size_t r = 0; r < rows; ++r, x += in) {
    for (std::size_t m = 0; m < maps.size(); ++m) {
      const LinearMap& map = maps[m];
      for (std::size_t o = 0; o < map.out; ++o) {
        double sum = map.bias ? map.bias[o] : 0.0;
        for (std::size_t i = 0; i < in; ++i) sum += static_cast<double>(x[i]) * weights[m][o * in + i];
        *y++ = static_cast<float>(sum + (residual ? *residual++ : 0.0f));
      }
    }
  }
}

void linear_backward(const float* grad_y, std::size_t rows, std::size_t in, std::span<const LinearMap> maps, float* grad_x) {
  const std::size_t width = total_out(maps);
  const auto weights = restored(maps, in);
  for (std::size_t r = 0; r < rows; ++r, grad_y += width) {
    for (std::size_t i = 0; i < in; ++i) {
      double sum = 0;
      const float* gained = grad_y;
      for (std::size_t m = 0; m < maps.size(); ++m)
        for (std::size_t o = 0; o < maps[m].out; ++o) sum += static_cast<double>(*gained++) * weights[m][o * in + i];
      *grad_x++ = static_cast<float>(sum);
    }
  }
}

}  // namespace veloxquant::reference
