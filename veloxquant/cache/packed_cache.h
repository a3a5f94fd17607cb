// A cache that really is that small: codes of the tokens, 8 bits of the window and the sinks, and attention over them.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "mlx/array.h"
#include "veloxquant/cache/packed_head.h"
#include "veloxquant/cache/packed_state.h"
#include "veloxquant/plan/plan.h"

namespace veloxquant {

/// How one layer is stored, shared by all its caches.
class PackedLayer {
 public:
  /// `keys` and `values`: of each KV head, or one for all.  Throws std::invalid_argument that names a method that cannot be packed.
  PackedLayer(std::vector<QuantizerParameters> keys, std::vector<QuantizerParameters> values, int window, int sinks);

  struct Codecs {
    std::vector<std::shared_ptr<const BlockCodec>> keys, values;  // as many as were given

    const BlockCodec& of(Side side, std::size_t head) const { return *unit(side == Side::kKeys ? keys : values, head); }
  };

  /// Made at the first call: what is looked up for keys depends on how they turn.  One layer has one rope.
  const Codecs& codecs(const Rope& rope) const;

  /// An empty head.
  PackedHead head(std::size_t head) const;

  StateSizes state_sizes(std::size_t kv_heads) const;

  std::size_t units(Side side) const { return side == Side::kKeys ? keys_.size() : values_.size(); }
  bool keys_before_rope() const { return keys_before_rope_; }
  std::size_t window() const { return window_; }
  std::size_t sinks() const { return sinks_; }
  const Quantizer& exact(Side side) const { return *(side == Side::kKeys ? exact_keys_ : exact_values_); }

 private:
  template <class Unit>
  static const Unit& unit(const std::vector<Unit>& units, std::size_t head) {
    return units[units.size() == 1 ? 0 : head];
  }

  std::vector<QuantizerParameters> keys_, values_;
  std::vector<BlockShape> key_shapes_, value_shapes_;
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
class PackedCache : public PackedAttentionCache {
 public:
  explicit PackedCache(std::shared_ptr<const PackedLayer> layer);
  ~PackedCache() override;

  /// Evaluates q, k and v.
  mx::array attend(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionSpec& spec) override;
  int offset() const override { return static_cast<int>(offset_); }
  std::vector<int> tokens() const override;

  /// Allocated for tokens: blocks, window and sinks; codebooks are the layer's.
  std::size_t nbytes() const override;

  std::string kernels() const override { return "cpu"; }

  int trim(int tokens) override;
  std::unique_ptr<SavableCache> clone() const override;
  CacheState state() const override;
  void restore(const CacheState& state) override;

 private:
  // In memory: sinks, then `coded` tokens as codes, then those of the window.
  struct Sequence {
    std::size_t tokens = 0, coded = 0;
    std::vector<PackedHead> heads = {};  // none before the first token
  };
  struct Step;
  class Attention;

  std::vector<Step> steps(int batch, int tokens, const AttentionSpec& spec) const;
  void check_shapes(const mx::array& q, const mx::array& k, const mx::array& v) const;
  void begin(std::size_t kv_heads);
  std::size_t coded_of(const Sequence& sequence) const;  // once the window is as full as it may be

  std::shared_ptr<const PackedLayer> layer_;
  std::vector<Sequence> sequences_;
  std::size_t offset_ = 0;
  mutable Busy busy_;
};

/// Packed caches for every layer of a plan, full ones for those that slide: PackedCache on the CPU, PackedArrays elsewhere.  Throws
/// std::invalid_argument that names the method for one that cannot be packed.
CacheFactory packed_factory(const Plan& plan);

}  // namespace veloxquant
