// Our CPU kernels as nodes of MLX's graph.
#pragma once

#include <functional>
#include <vector>

#include "mlx/array.h"
#include "veloxquant/kernels/strided.h"
#include "veloxquant/model/device.h"

namespace veloxquant {

/// Reads evaluated inputs and fills `output`, which is row-contiguous and allocated.  Runs on MLX's stream thread; must not throw.
using CpuKernel = std::function<void(const std::vector<mx::array>& inputs, mx::array& output)>;

/// An array of `shape` and `dtype` that `kernel` computes from `inputs` when it is evaluated, on the default stream of the CPU.
/// `name` (a literal) shows in MLX's graph printing.
mx::array cpu_operation(const char* name, std::vector<mx::array> inputs, mx::Shape shape, mx::Dtype dtype, CpuKernel kernel);

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

/// A float32 array [B, H, T, D] whose last axis is contiguous, as our kernels take it.
StridedView strided(const mx::array& x);
MutableStridedView mutable_strided(mx::array& x);

}  // namespace veloxquant
