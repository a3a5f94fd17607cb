// A cache that really is that small: codes of the tokens, 8 bits of the window and the sinks, and attention over them.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "mlx/array.h"
#include "veloxquant/cache/block_codec.h"
#include "veloxquant/model/attention_cache.h"
#include "veloxquant/plan/plan.h"

namespace veloxquant {

/// How one layer is stored, shared by all its caches.
class PackedLayer {
 public:
  /// `keys` and `values`: of each KV head, or one for all.  Throws std::invalid_argument that names a method that cannot be packed.
  PackedLayer(std::vector<QuantizerParameters> keys, std::vector<QuantizerParameters> values, int window, int sinks);

  struct Codecs {
    std::vector<std::shared_ptr<const BlockCodec>> keys, values;  // as many as were given
  };

  /// Made at the first call: what is looked up for keys depends on how they turn.  One layer has one rope.
  const Codecs& codecs(const Rope& rope) const;

  bool keys_before_rope() const { return keys_before_rope_; }
  std::size_t window() const { return window_; }
  std::size_t sinks() const { return sinks_; }
  const Quantizer& exact(Side side) const { return *(side == Side::kKeys ? exact_keys_ : exact_values_); }

 private:
  std::vector<QuantizerParameters> keys_, values_;
  std::unique_ptr<const Quantizer> exact_keys_, exact_values_;  // of window and sinks
  bool keys_before_rope_;
  std::size_t window_, sinks_;
  mutable std::once_flag made_;
  mutable std::optional<Rope> rope_;
  mutable Codecs codecs_;
};

/// Keys and values of one layer as codes, on the CPU.
///
/// Tokens are rounded to 8 bits as they arrive; the first `sinks` stay so.  A token that leaves the window of the last `window` is
/// encoded, from what the window held.  Memory grows by blocks of kPackedBlockTokens tokens.  Attention reads the codes: nothing is
/// restored but a tile at a time.  It sees what RestoringCache does, but for the block that still grows: its patches are chosen
/// among the tokens that have left the window.
///
/// Not to be used from two threads at once: std::logic_error where that is seen.
class PackedCache : public AttentionCache {
 public:
  explicit PackedCache(std::shared_ptr<const PackedLayer> layer);
  ~PackedCache() override;

  /// Evaluates q, k and v.  Throws std::invalid_argument for padding, which it does not know.
  mx::array attend(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionSpec& spec) override;
  int offset() const override { return static_cast<int>(offset_); }

  /// Allocated for tokens: blocks, window and sinks; codebooks are the layer's.
  std::size_t nbytes() const override;

 private:
  struct Head;
  class Attention;

  void begin(const mx::array& k, const PackedLayer::Codecs& codecs);
  std::size_t coded() const;  // tokens that are codes

  std::shared_ptr<const PackedLayer> layer_;
  std::vector<std::unique_ptr<Head>> heads_;  // [batch, kv_heads]
  std::size_t batch_ = 0, kv_heads_ = 0, dim_ = 0, offset_ = 0;
  std::atomic<bool> busy_ = false;
};

/// Of any packed cache.  Throws std::invalid_argument unless `k`, the first that it is given, has as many KV heads as there are
/// units of keys and of values (or one of each), of so many dimensions; …
void check_units(const mx::array& k, std::size_t key_units, std::size_t value_units, int dim);

/// … and unless k and v are of the expected shape [batch, kv_heads, tokens, dim], and q has queries for them.
void check_chunk(const mx::array& q, const mx::array& k, const mx::array& v, const mx::Shape& expected);

/// Packed caches for every layer of a plan, full ones for those that slide: PackedCache on the CPU, PackedArrays elsewhere.  Throws
/// std::invalid_argument that names the method for one that cannot be packed.
CacheFactory packed_factory(const Plan& plan);

}  // namespace veloxquant
