// What PackedArrays does by kernels of ours, on CUDA (kernels/cuda): tokens become codes, codes are attended to and restored.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "mlx/array.h"
#include "veloxquant/cache/cuda_program.h"
#include "veloxquant/cache/fast_attention.h"
#include "veloxquant/cache/layer_tables.h"
#include "veloxquant/model/attention_cache.h"

namespace veloxquant {

/// One layer's tables on the GPU, and what calls the kernels with them.  Numbers of tokens are the host's.
class PackedKernels {
 public:
  /// On a device that cuda_refusal() does not refuse.  Throws std::runtime_error where a kernel is not compiled.  Or why there are none
  /// for such a layer.
  static std::variant<std::unique_ptr<const PackedKernels>, std::string> make(const LayerUnits& keys, const LayerUnits& values,
                                                                              int kv_heads, int window, int sinks, const Rope& rope);

  int kv_heads() const { return kv_heads_; }

  /// What changes with each token, as PackedArrays has it: bytes and errors of W words and E patches a block.
  struct State {
    std::optional<mx::array> exact;   // uint8 [B, H, 2, sinks + window, bytes]
    mx::array open;                   // uint8 [B, 1, 4·W]
    std::optional<mx::array> errors;  // float32 [B, 1, E]
  };

  /// Tokens of codes, and all.
  struct Counts {
    int coded, offset;
  };

  /// The state with one more token k and v [B, H, 1, D] float32.  One kernel.
  State append(const State& state, const mx::array& k, const mx::array& v, const Counts& before, const Counts& after) const;

  /// Many tokens, in 8 bits: with the sinks there are then, vectors [B, H, 2, sinks + n, D] float32, the last from position `begin`
  /// on, their keys [B, H, sinks + n, D] turned, and what is exact.  One kernel.
  struct Rounded {
    mx::array vectors, turned;
    int sinks, begin;
    std::optional<mx::array> exact;
  };
  Rounded round(const std::optional<mx::array>& exact, const mx::array& k, const mx::array& v, const Counts& before,
                const Counts& after) const;

  /// Of those the first after the sinks become codes: blocks uint8 [B, blocks, 4·W] from the one on that is open, and what patches of
  /// the last one have lost.  Two kernels.
  struct Encoded {
    mx::array blocks;
    std::optional<mx::array> errors;
  };
  Encoded encode(const State& state, const Rounded& rounded, const Counts& before, const Counts& after) const;

  /// Queries of the last T tokens q [B, Hq, T, D] float32, turned, over the `count` codes from the first on, the begin of a tile, and
  /// over the exact tokens → float32 [B, Hq, T, D].  All see the codes of `before`, even in their windows.  Keys and values are restored
  /// at once, scores are of as many queries as kScoresAtOnce has room for.  Two kernels, and two products.
  mx::array attend_many(const mx::array& q, const std::optional<mx::array>& closed, const mx::array& open, const Rounded& rounded,
                        int first, int count, const Counts& before, const Counts& after, const AttentionSpec& spec) const;

  /// Queries of the last token q [B, Hq, 1, D] float32, turned, over the codes in blocks [B, blocks, 4·W] and the open one, and over
  /// the exact tokens → float32 [B, Hq, 1, D].  Two kernels.
  mx::array attend(const mx::array& q, const std::optional<mx::array>& closed, const State& state, const Counts& counts,
                   const AttentionSpec& spec) const;

 private:
  PackedKernels() = default;

  int kv_heads_, dim_, window_, sinks_, block_bytes_, num_errors_, most_width_;
  std::optional<mx::array> tables_;  // LayerTables and what it speaks of
  std::optional<CudaProgram> round_, encode_, patch_, append_, restore_, softmax_, attend_, finish_;
  std::unique_ptr<const FastAttention> fast_;  // where it serves
};

}  // namespace veloxquant
