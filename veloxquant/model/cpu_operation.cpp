#include "veloxquant/model/cpu_operation.h"

#include <atomic>
#include <cassert>
#include <memory>
#include <new>
#include <stdexcept>
#include <utility>

#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"

namespace veloxquant {
namespace {

std::atomic<int> mlx_operations_scopes = 0;

class CpuOperation : public mx::Primitive {
 public:
  CpuOperation(mx::Stream stream, const char* name, CpuKernel kernel, CpuGradient gradient)
      : Primitive(stream),
        name_(name),
        kernel_(std::make_shared<const CpuKernel>(std::move(kernel))),
        gradient_(std::move(gradient)) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    auto& encoder = mx::cpu::get_command_encoder(stream());
    std::vector<mx::array> read, written;
    for (const auto& input : inputs) {
      encoder.set_input_array(input);
      read.push_back(mx::array::unsafe_weak_copy(input));
    }
    for (auto& output : outputs) {
      auto data = mx::allocator::malloc(output.nbytes());
      if (!data.buffer().ptr() && output.nbytes() > 0) throw std::bad_alloc();  // MLX does not look
      output.set_data(std::move(data));
      encoder.set_output_array(output);
      written.push_back(mx::array::unsafe_weak_copy(output));
    }
    encoder.dispatch(
        [kernel = kernel_, read = std::move(read), written = std::move(written)]() mutable { (*kernel)(read, written); });
  }

  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::logic_error(std::string(name_) + " is an operation of the CPU");
  }

  std::vector<mx::array> vjp(const std::vector<mx::array>& inputs, const std::vector<mx::array>& gradients,
                             const std::vector<int>& wanted, const std::vector<mx::array>& outputs) override {
    if (!gradient_) throw std::logic_error(std::string(name_) + " has no gradient");
    return gradient_(inputs, outputs, gradients, wanted);
  }

  const char* name() const override { return name_; }

 private:
  const char* name_;
  std::shared_ptr<const CpuKernel> kernel_;
  CpuGradient gradient_;
};

}  // namespace

std::vector<mx::array> cpu_operation(const char* name, std::vector<mx::array> inputs, std::vector<mx::Shape> shapes,
                                     CpuKernel kernel, CpuGradient gradient) {
  const auto primitive =
      std::make_shared<CpuOperation>(mx::default_stream(mx::Device::cpu), name, std::move(kernel), std::move(gradient));
  const std::vector<mx::Dtype> types(shapes.size(), mx::float32);
  return mx::array::make_arrays(std::move(shapes), types, primitive, inputs);
}

bool own_kernels() {
  return mx::default_device() == mx::Device::cpu && mlx_operations_scopes == 0;
}

MlxOperationsScope::MlxOperationsScope() {
  ++mlx_operations_scopes;
}
MlxOperationsScope::~MlxOperationsScope() {
  --mlx_operations_scopes;
}

StridedInput::StridedInput(const mx::array& x) : view_{x.data<float>(), x.strides(0), x.strides(1), x.strides(2)} {
  assert(x.ndim() == 4);
  if (x.strides(3) == 1 || x.shape(3) == 1) return;
  const StridedView from = view_;
  const std::size_t heads = static_cast<std::size_t>(x.shape(1)), tokens = static_cast<std::size_t>(x.shape(2)),
                    dim = static_cast<std::size_t>(x.shape(3));
  copy_.reserve(x.size());
  for (std::size_t b = 0; b < static_cast<std::size_t>(x.shape(0)); ++b)
    for (std::size_t h = 0; h < heads; ++h)
      for (std::size_t t = 0; t < tokens; ++t)
        for (std::size_t i = 0; i < dim; ++i) copy_.push_back(from.at(b, h, t)[static_cast<std::ptrdiff_t>(i) * x.strides(3)]);
  const auto row = static_cast<std::ptrdiff_t>(dim), head = row * static_cast<std::ptrdiff_t>(tokens);
  view_ = {copy_.data(), head * static_cast<std::ptrdiff_t>(heads), head, row};
}

mx::Shape token_major_shape(const mx::array& x) {
  return {x.shape(0), x.shape(2), x.shape(1), x.shape(3)};
}

mx::array from_token_major(const mx::array& x) {
  return mx::transpose(x, {0, 2, 1, 3});
}

StridedView token_major_view(const mx::array& x) {
  const std::ptrdiff_t heads = x.shape(2), dim = x.shape(3);
  return {x.data<float>(), x.shape(1) * heads * dim, dim, heads * dim};
}

MutableStridedView token_major_view(mx::array& x) {
  const StridedView view = token_major_view(std::as_const(x));
  return {x.data<float>(), view.batch_stride, view.head_stride, view.token_stride};
}

}  // namespace veloxquant
