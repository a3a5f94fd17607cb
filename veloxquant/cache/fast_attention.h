// Attention over the codes of rotated_pq on tensor cores (kernels/cuda/packed_attention.cuh), where tables fit into shared memory.
#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "mlx/array.h"
#include "veloxquant/cache/cuda_program.h"
#include "veloxquant/cache/layer_tables.h"
#include "veloxquant/model/rope.h"

namespace veloxquant {

/// Entries of keys and values are bytes there, keys and weights half precision.
class FastAttention {
 public:
  /// Null where it does not serve, or does not pay: for heads of less than 96 dimensions; for methods other than rotated_pq; where one
  /// side has a unit for each head and the other one for all; for sub-spaces of more than 32 dimensions; for heads of a number of
  /// dimensions that is no multiple of 16, or that turn in part and are lengthened by it, unless keys are turned plane by plane
  /// (`plane`); for more exact tokens (window and sinks) than shared memory holds; and where keys have more tables than it holds (heads
  /// of 128: from about 3 bits on).
  static std::unique_ptr<const FastAttention> make(const LayerUnits& keys, const LayerUnits& values, int kv_heads, int window, int sinks,
                                                   const Rope& rope);

  /// Whether it is the faster one: tables have to be loaded first.
  bool pays(int coded) const;

  /// Stretches that `coded` tokens are cut into.
  int splits(int sequence_heads, int rows, int coded) const;

  /// Parts as kernels/cuda/packed_attention_end.cuh takes them, `splits` of codes and one of exact tokens.
  std::vector<mx::array> attend(const mx::array& tables, const mx::array& q, const mx::array& closed, const mx::array& open,
                                const mx::array& exact, int num_closed, int coded, int offset, int splits, float scale,
                                float soft_cap) const;

 private:
  FastAttention() = default;

  int kv_heads_, dim_, num_tables_, rest_columns_, most_codes_, most_patches_, patch_stride_, rest_bytes_, warps_;
  std::string kind_, template_arguments_;
  std::vector<mx::array> arrays_;  // in the order in which the kernel takes them
  int shared_bytes_;
  mutable std::once_flag compiled_;
  mutable std::optional<CudaProgram> attend_;
};

}  // namespace veloxquant
