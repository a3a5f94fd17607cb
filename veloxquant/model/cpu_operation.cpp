#include "veloxquant/model/cpu_operation.h"

#include <atomic>
#include <cassert>
#include <memory>
#include <stdexcept>
#include <utility>

#include "mlx/allocator.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/primitives.h"
#include "mlx/utils.h"

namespace veloxquant {
namespace {

std::atomic<int> mlx_operations_scopes = 0;

class CpuOperation : public mx::UnaryPrimitive {
 public:
  CpuOperation(mx::Stream stream, const char* name, CpuKernel kernel)
      : UnaryPrimitive(stream), name_(name), kernel_(std::make_shared<const CpuKernel>(std::move(kernel))) {}

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& output) override {
    output.set_data(mx::allocator::malloc(output.nbytes()));
    auto& encoder = mx::cpu::get_command_encoder(stream());
    std::vector<mx::array> read;
    for (const auto& input : inputs) {
      encoder.set_input_array(input);
      read.push_back(mx::array::unsafe_weak_copy(input));
    }
    encoder.set_output_array(output);
    encoder.dispatch([kernel = kernel_, read = std::move(read), written = mx::array::unsafe_weak_copy(output)]() mutable {
      (*kernel)(read, written);
    });
  }

  void eval_gpu(const std::vector<mx::array>&, mx::array&) override {
    throw std::logic_error(std::string(name_) + " is an operation of the CPU");
  }

  const char* name() const override { return name_; }

 private:
  const char* name_;
  std::shared_ptr<const CpuKernel> kernel_;
};

}  // namespace

mx::array cpu_operation(const char* name, std::vector<mx::array> inputs, mx::Shape shape, mx::Dtype dtype, CpuKernel kernel) {
  auto primitive = std::make_shared<CpuOperation>(mx::default_stream(mx::Device::cpu), name, std::move(kernel));
  return mx::array(std::move(shape), dtype, std::move(primitive), std::move(inputs));
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

StridedView strided(const mx::array& x) {
  assert(x.ndim() == 4 && (x.strides(3) == 1 || x.shape(3) == 1));
  return {x.data<float>(), x.strides(0), x.strides(1), x.strides(2)};
}

MutableStridedView mutable_strided(mx::array& x) {
  const StridedView view = strided(x);
  return {x.data<float>(), view.batch_stride, view.head_stride, view.token_stride};
}

}  // namespace veloxquant
