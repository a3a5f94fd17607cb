// Our CPU kernels as nodes of MLX's graph.
#pragma once

#include <functional>
#include <vector>

#include "mlx/array.h"
#include "veloxquant/kernels/strided.h"
#include "veloxquant/model/device.h"

namespace veloxquant {

/// Reads evaluated inputs and fills `outputs`, which are float32, row-contiguous and allocated.  Runs on MLX's stream thread; what
/// it throws comes out of mx::eval.
using CpuKernel = std::function<void(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs)>;

/// Gradients of a loss by the inputs whose indices are `wanted`, in that order, from those by the outputs.
using CpuGradient =
    std::function<std::vector<mx::array>(const std::vector<mx::array>& inputs, const std::vector<mx::array>& outputs,
                                         const std::vector<mx::array>& gradients, const std::vector<int>& wanted)>;

/// Float32 arrays of `shapes` that `kernel` computes from `inputs` when they are evaluated, on the default stream of the CPU.
/// `name` (a literal) shows in MLX's graph printing.  Without `gradient`, differentiating throws std::logic_error.
std::vector<mx::array> cpu_operation(const char* name, std::vector<mx::array> inputs, std::vector<mx::Shape> shapes,
                                     CpuKernel kernel, CpuGradient gradient = {});

/// Whether new operations are to be cpu_operations: on the CPU, unless an MlxOperationsScope is alive.
bool own_kernels();

/// Leaves everything to MLX's own operations for its life, as a GPU back end does: for tests and benchmarks that compare.
class MlxOperationsScope {
 public:
  MlxOperationsScope();
  ~MlxOperationsScope();
  MlxOperationsScope(const MlxOperationsScope&) = delete;
  MlxOperationsScope& operator=(const MlxOperationsScope&) = delete;
};

/// An evaluated float32 array [B, H, T, D] as our kernels read it: in place where its last axis is contiguous, or else a copy.
class StridedInput {
 public:
  explicit StridedInput(const mx::array& x);

  const StridedView& view() const { return view_; }

 private:
  std::vector<float> copy_;
  StridedView view_;
};

/// Our kernels write arrays of heads with tokens outside and heads inside, [B, T, H, D], so that what reads them as rows of all
/// heads needs no copy.  The shape of such an array for x [B, H, T, D]; the array by the axes of x; and an evaluated contiguous one
/// as kernels see it, [B, H, T, D].
mx::Shape token_major_shape(const mx::array& x);
mx::array from_token_major(const mx::array& x);
StridedView token_major_view(const mx::array& x);
MutableStridedView token_major_view(mx::array& x);

}  // namespace veloxquant
