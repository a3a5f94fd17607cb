// What PackedArrays does by kernels of ours, on CUDA (kernels/cuda): attention and encoding of one token at a time.
#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "mlx/array.h"
#include "mlx/fast.h"
#include "veloxquant/model/attention_cache.h"
#include "veloxquant/quantize/parameters.h"

namespace veloxquant {

/// One layer's tables on the GPU, and what calls the kernels with them.  Entries of keys and values are bytes there, keys and
/// weights half precision: what attention gives is off by 4 to 8 % of what 2-bit storage costs it, in the root of the mean square.
class PackedKernels {
 public:
  /// `keys` and `values`: of each KV head, or one for all.  Null where the kernels do not serve: on another device, or a GPU before
  /// Ampere; for methods other than rotated_pq; where one side has a unit for each head and the other one for all; for sub-spaces
  /// of more than 32 dimensions; for heads of a number of dimensions that is no multiple of 16, or that turn in part and are
  /// lengthened by it, unless keys are turned plane by plane (`plane`); for more exact tokens (window and sinks) than shared memory
  /// holds, 440 of 128 dimensions; and where keys have more tables than it holds (heads of 128: from about 3 bits on).
  static std::unique_ptr<const PackedKernels> make(const std::vector<QuantizerParameters>& keys,
                                                   const std::vector<QuantizerParameters>& values, int kv_heads, int window,
                                                   int sinks, const Rope& rope);

  int kv_heads() const { return kv_heads_; }

  /// As PackedArrays has it.
  struct State {
    std::optional<mx::array> exact;   // uint8 [B, H, 2, sinks + window, bytes]
    mx::array open;                   // uint8 [B, 1, W]
    std::optional<mx::array> errors;  // float32 [B, 1, patches]
    mx::array counts;                 // counts(…)
  };

  /// Tokens as the kernels count them: of codes, and all.
  static mx::array counts(int coded, int offset);

  /// The state with one more token k and v [B, H, 1, D] float32; one more becomes codes where more than the window would follow
  /// those that are.  One kernel.
  State append(const State& state, const mx::array& k, const mx::array& v) const;

  /// Queries of the last token q [B, Hq, 1, D] float32, turned, over the `coded` tokens in blocks [B, blocks, W] and the open one,
  /// and over the exact ones → float32 [B, Hq, 1, D].  Two kernels.
  mx::array attend(const mx::array& q, const std::optional<mx::array>& closed, const State& state, int coded,
                   const AttentionSpec& spec) const;

 private:
  PackedKernels() = default;

  int kv_heads_, dim_, window_, sinks_, key_units_, value_units_, warps_, most_codes_, most_patches_, patch_stride_, rest_bytes_;
  float magnitude_;
  std::vector<mx::array> attention_, back_, encoding_;  // arrays that the kernels are given, in their order
  mx::fast::CustomKernelFunction attend_, finish_, encode_;
  mutable std::mutex settings_mutex_;
  mutable std::pair<float, float> settings_of_;  // scale, soft cap
  mutable std::optional<mx::array> settings_;
};

}  // namespace veloxquant
