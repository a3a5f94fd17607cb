#include "veloxquant/model/ops.h"

#include "mlx/fast.h"
#include "mlx/ops.h"
#include "veloxquant/kernels/rms_norm.h"
#include "veloxquant/kernels/silu_gate.h"
#include "veloxquant/model/cpu_operation.h"

namespace veloxquant {

mx::array Linear::operator()(const mx::array& x) const {
  const auto product = mx::matmul(x, mx::transpose(weight));
  return bias ? mx::add(product, *bias) : product;
}

mx::array rms_norm(const mx::array& x, const mx::array& weight, float eps) {
  if (!own_kernels()) return mx::fast::rms_norm(x, weight, eps);
  return cpu_operation(
      "RmsNorm", {mx::contiguous(x), weight}, x.shape(), mx::float32, [eps](const std::vector<mx::array>& in, mx::array& out) {
        rms_norm(in[0].data<float>(), in[1].data<float>(), out.data<float>(), in[0].size() / in[1].size(), in[1].size(), eps);
      });
}

mx::array silu_gate(const mx::array& joined) {
  const int width = joined.shape(-1) / 2;
  if (!own_kernels()) {
    const auto parts = mx::split(joined, 2, -1);
    return mx::multiply(mx::multiply(parts[0], mx::sigmoid(parts[0])), parts[1]);
  }
  auto shape = joined.shape();
  shape.back() = width;
  return cpu_operation("SiluGate", {mx::contiguous(joined)}, shape, mx::float32,
                       [width](const std::vector<mx::array>& in, mx::array& out) {
                         silu_gate_joined(in[0].data<float>(), out.data<float>(), out.size() / width, width);
                       });
}

}  // namespace veloxquant
