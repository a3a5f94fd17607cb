// Our CUDA kernels, compiled once for a GPU and kept on disk, so that a process does not wait for a compiler.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "mlx/array.h"
#include "mlx/fast.h"
#include "veloxquant/model/device.h"

namespace veloxquant {

/// One kernel of kernels/cuda/packed_entries.cuh, for the GPU in use.
class CudaProgram {
 public:
  /// `entry` is ROUND, ENCODE, …: what VELOXQUANT_… selects; `kind` ends the kernel's name, `more` are further definitions NAME=VALUE.
  /// Compiled by NVRTC, which MLX's CUDA back end brings, unless cuda_cache_folder() has what this source gave for such a GPU.
  /// Throws std::runtime_error with the compiler's words.
  CudaProgram(std::string_view entry, std::string_view kind, const std::vector<std::string>& more = {});

  /// Arrays that are read, made contiguous; shapes and types of those that are written; numbers; blocks of threads, threads of one,
  /// bytes of shared memory, the same for each call of one kind.
  std::vector<mx::array> operator()(const std::vector<mx::array>& inputs, const std::vector<mx::Shape>& shapes,
                                    const std::vector<mx::Dtype>& types, const std::vector<mx::fast::ScalarArg>& numbers,
                                    std::tuple<int, int, int> blocks, int threads, int shared_bytes) const;

 private:
  std::string name_;
  std::shared_ptr<const std::string> code_;
};

/// VELOXQUANT_CACHE_DIR, else veloxquant in XDG_CACHE_HOME or ~/.cache; empty where none of these is set.
std::string cuda_cache_folder();

/// Whether a compiler can be had: MLX's CUDA back end, a GPU from compute capability 8.0 on, NVRTC.  Otherwise why not.
std::string cuda_refusal();

/// Of the GPU in use: shared memory that a block of threads may have, in bytes, and processors.
int most_shared_bytes();
int cuda_processors();

}  // namespace veloxquant
