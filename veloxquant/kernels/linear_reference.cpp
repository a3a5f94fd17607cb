#include "veloxquant/kernels/linear.h"

namespace veloxquant::reference {
namespace {

std::size_t total_out(std::span<const LinearMap> maps) {
  std::size_t total = 0;
  for (const auto& map : maps) total += map.out;
  return total;
}

}  // namespace

void linear(const float* x, std::size_t rows, std::size_t in, std::span<const LinearMap> maps, const float* residual, float* y) {
  for (std::size_t r = 0; r < rows; ++r, x += in) {
    for (const auto& map : maps) {
      for (std::size_t o = 0; o < map.out; ++o) {
        double sum = map.bias ? map.bias[o] : 0.0;
        for (std::size_t i = 0; i < in; ++i) sum += static_cast<double>(x[i]) * map.weight[o * in + i];
        *y++ = static_cast<float>(sum + (residual ? *residual++ : 0.0f));
      }
    }
  }
}

void linear_backward(const float* grad_y, std::size_t rows, std::size_t in, std::span<const LinearMap> maps, float* grad_x) {
  const std::size_t width = total_out(maps);
  for (std::size_t r = 0; r < rows; ++r, grad_y += width) {
    for (std::size_t i = 0; i < in; ++i) {
      double sum = 0;
      const float* gained = grad_y;
      for (const auto& map : maps)
        for (std::size_t o = 0; o < map.out; ++o) sum += static_cast<double>(*gained++) * map.weight[o * in + i];
      *grad_x++ = static_cast<float>(sum);
    }
  }
}

}  // namespace veloxquant::reference
