// A packed cache as a graph of MLX's operations, for back ends where our CPU code does not run.
#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "mlx/array.h"
#include "veloxquant/cache/graph_codec.h"
#include "veloxquant/cache/layer_tables.h"
#include "veloxquant/cache/packed_kernels.h"
#include "veloxquant/cache/packed_state.h"

namespace veloxquant {

/// How one layer is stored, shared by all its caches.
class PackedArraysLayer {
 public:
  /// `keys` and `values`: of each KV head, or one for all.  Throws std::invalid_argument that names a method that cannot be packed.
  PackedArraysLayer(const std::vector<QuantizerParameters>& keys, const std::vector<QuantizerParameters>& values, int window,
                    int sinks);

  /// Throws std::invalid_argument unless there are as many units as KV heads, or one for all.
  StateSizes state_sizes(int kv_heads) const;

  std::vector<GraphCodec> keys, values;  // as many as were given
  MethodGraph exact;                     // of window and sinks, keys and values alike
  int dim, window, sinks;
  bool keys_before_rope;

  /// Null where they do not serve.  Made at the first call for its rope, which a layer has one of, and number of KV heads.
  const PackedKernels* kernels(const Rope& rope, int kv_heads) const;

  /// Whether they were made, and else why not.
  bool has_kernels() const { return kernels_ != nullptr; }
  const std::string& refusal() const { return refusal_; }

 private:
  void make_units() const;

  mutable std::vector<QuantizerParameters> key_parameters_, value_parameters_;  // until then, …
  mutable std::optional<LayerUnits> key_units_, value_units_;                   // … and the quantizers, where there is a GPU
  mutable std::once_flag made_;
  mutable std::unique_ptr<const PackedKernels> kernels_;
  mutable std::string refusal_;  // why there are none
};

/// What PackedCache stores and sees, in arrays: nothing is evaluated while tokens are appended and attended to, and nothing comes
/// back to the host.  Evaluating what attend() returns evaluates what is stored as well.
///
/// Codes are read in stretches of 2048 tokens with a running softmax; no more than that is restored at a time.  Sequences of as
/// many tokens are handled together, others one after another.
class PackedArrays : public PackedAttentionCache {
 public:
  explicit PackedArrays(std::shared_ptr<const PackedArraysLayer> layer);

  /// Evaluates spec.padding.
  mx::array attend(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionSpec& spec) override;
  int offset() const override { return offset_; }
  std::vector<int> tokens() const override;

  /// Allocated for tokens: blocks, window and sinks; codebooks are the layer's.
  std::size_t nbytes() const override;

  std::string kernels() const override { return layer_->has_kernels() ? "cuda" : "graph"; }
  std::string no_kernels() const override { return layer_->refusal(); }

  /// What is stored, which may still have to be evaluated.
  std::vector<mx::array> pending() const;

  int trim(int tokens) override;
  std::unique_ptr<SavableCache> clone() const override;
  CacheState state() const override;
  void restore(const CacheState& state) override;

 private:
  // Heads that are stored alike.  Bytes of a block of tokens: those of the keys, then of the values, of one head after another,
  // from `bytes` of a row on; the same with what their patches have lost, from `errors` on.
  struct Heads {
    int first, count;
    const GraphCodec *keys, *values;
    int bytes, errors;

    int bytes_of_one() const { return keys->block_bytes() + values->block_bytes(); }
    int errors_of_one() const { return keys->patches() + values->patches(); }
  };

  // The last tokens, from position `begin` on: keys (not turned where they are stored so) and values [B, H, 2, n, D].
  struct Recent {
    int begin;
    mx::array vectors;
  };

  // Queries [B, H, rows, D], scaled; rows are the heads of a group, and in each so many tokens from position `first` on.
  struct Queries {
    mx::array q;
    int first, tokens;
    mx::array positions;  // int32 [rows, 1]
    int coded;            // all see the codes of so many tokens, even in their windows: those that were codes before
  };

  // Σ weight · value [B, H, rows, D] by weights e^(score − maximum), with maximum and Σ weight [B, H, rows, 1].
  struct Partial {
    mx::array sums, maximum, total;
  };

  void set_up(int batch, int kv_heads);

  // Sequences on their own; the last own[b] of the tokens are those of sequence b.
  mx::array attend_apart(const mx::array& q, const mx::array& k, const mx::array& v, const std::vector<int>& own,
                         const AttentionSpec& spec);
  PackedArrays sequence(int index) const;
  void take(const CacheState& state, int patches, int coded);

  // k and v [B, H, T, D] float32: stores them, and encodes what leaves the window.
  Recent append(const mx::array& k, const mx::array& v);
  int coded_at(int offset) const;

  // By kernels: q, turned, k and v float32.
  mx::array attend_one(const PackedKernels& kernels, const mx::array& q, const mx::array& k, const mx::array& v,
                       const AttentionSpec& spec);
  mx::array attend_many(const PackedKernels& kernels, const mx::array& q, const mx::array& k, const mx::array& v,
                        const AttentionSpec& spec);

  mx::array exact_bytes(int begin, int end) const;
  void store_exact(const mx::array& bytes, int first, int begin, int end);
  void append_coded(const mx::array& vectors, int index);
  GraphCodec::Blocks encode(const mx::array& vectors, int at, int blocks) const;
  void keep_coded(int kept);

  // Over codes; over the sinks and what is recent.  None where no query sees any.
  std::optional<Partial> attend_coded(const Queries& queries, const AttentionSpec& spec) const;
  std::optional<Partial> attend_exact(const Queries& queries, const Recent& recent, const AttentionSpec& spec) const;
  mx::array blocks(int begin, int end) const;

  // each(codec, first byte of its block in a row, first of its errors) for the keys and values of one head after another.
  template <class Each>
  void each_unit(const Each& each) const;
  // make(heads, kKeys or kValues, codec, first byte, first error) of heads that are stored alike → rows of all.
  template <class Make>
  GraphCodec::Blocks rows_of(const Make& make) const;
  mx::array bytes_of(const Heads& some, const mx::array& block, int byte, const GraphCodec& codec) const;
  mx::array errors_of(const Heads& some, int error, const GraphCodec& codec) const;
  mx::array turned(const mx::array& keys, int position, const AttentionSpec& spec) const;
  static void extend(std::optional<Partial>& partial, const Queries& queries, const mx::array& k, const mx::array& v,
                     const std::optional<mx::array>& seen, float soft_cap);

  mutable Busy busy_;
  std::shared_ptr<const PackedArraysLayer> layer_;
  std::vector<PackedArrays> sequences_;  // one for each, where their tokens are not as many; what follows `offset_` is then theirs
  int batch_ = 0, kv_heads_ = 0, offset_ = 0;
  std::vector<Heads> heads_;
  int coded_ = 0;                    // tokens that are codes
  std::optional<mx::array> closed_;  // uint8 [B, blocks, bytes]: whole blocks
  std::optional<mx::array> open_;    // uint8 [B, 1, bytes]: the one that grows
  std::optional<mx::array> errors_;  // float32 [B, 1, patches]: what those of the last block have lost
  std::optional<mx::array> exact_;  // uint8 [B, H, 2, sinks + window, bytes of a token]: position p ≥ sinks at sinks + p % window
};

}  // namespace veloxquant
