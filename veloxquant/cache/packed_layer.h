// How one layer is stored by packed caches on the CPU.
#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "veloxquant/cache/packed_head.h"
#include "veloxquant/cache/packed_state.h"

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

  /// So many empty heads.
  std::vector<PackedHead> heads(std::size_t kv_heads) const;

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

}  // namespace veloxquant
