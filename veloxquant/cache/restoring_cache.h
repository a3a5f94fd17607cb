// A cache that stores nothing in few bits but behaves as if it did: for measuring what a plan costs a model.
#pragma once

#include <functional>
#include <optional>

#include "mlx/array.h"
#include "veloxquant/model/attention_cache.h"
#include "veloxquant/model/token_store.h"
#include "veloxquant/plan/plan.h"

namespace veloxquant {

/// Replaces vectors by what would be read back of them: x [B, H, T, D] → the same shape.
struct Restore {
  std::function<mx::array(const mx::array& x)> apply;
  int token_group = 1;  // tokens, counted from position 0, that must be restored together (KIVI's keys)
};

/// Quantises keys (after RoPE) and values as they arrive, keeps what is read back in float32 and attends to that: query t sees the
/// keys and values up to t as they would be stored.  Tokens of a group that is not complete are restored anew when more arrive.
class RestoringCache : public AttentionCache {
 public:
  RestoringCache(Restore keys, Restore values) : restore_keys_(std::move(keys)), restore_values_(std::move(values)) {}

  mx::array attend(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionSpec& spec) override;
  int offset() const override { return offset_; }
  std::size_t nbytes() const override { return complete_.nbytes(); }

 private:
  Restore restore_keys_, restore_values_;
  TokenStore complete_;                       // restored tokens of complete groups
  std::optional<mx::array> tail_k_, tail_v_;  // the others as they came: keys after RoPE, values
  int offset_ = 0;
};

/// What the quantizer of `parameters` gives back: its own code on the CPU, the same computed by MLX's operations on a GPU.
Restore make_restore(const QuantizerParameters& parameters);

/// Restoring caches for every layer of a plan.
CacheFactory restoring_factory(const Plan& plan);

}  // namespace veloxquant
