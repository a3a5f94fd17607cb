// A cache that stores nothing in few bits but behaves as if it did: for measuring what a plan costs a model.
#pragma once

#include <functional>
#include <optional>
#include <vector>

#include "mlx/array.h"
#include "veloxquant/model/attention.h"
#include "veloxquant/model/token_store.h"
#include "veloxquant/plan/plan.h"

namespace veloxquant {

/// Replaces vectors by what would be read back of them: x [B, H, T, D] → the same shape.
struct Restore {
  std::function<mx::array(const mx::array& x)> apply;
  int token_group = 1;       // tokens, counted from the first one stored, that must be restored together (KIVI's keys)
  bool before_rope = false;  // keys: restored as they come, then turned
};

/// Tokens that are kept exactly, which is at 8 bits (exact_parameters): those that a query sees most of.  Other tokens are coded
/// from what the window held of them.
struct ExactTokens {
  int window = 0;          // a query sees the last `window` tokens up to its own exactly,
  int sinks = 0;           // and the first `sinks`
  bool eight_bits = true;  // false: as they came, to measure what the coded tokens alone cost
};

/// Quantises keys and values as they arrive, keeps what is read back in float32 and attends to that: query t sees the keys and
/// values up to t as they would be stored.  Tokens of a group that is not complete are restored anew when more arrive.
class RestoringCache : public AttentionCache {
 public:
  RestoringCache(Restore keys, Restore values, ExactTokens exact = {});

  mx::array attend(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionSpec& spec) override;
  int offset() const override { return offset_; }
  std::size_t nbytes() const override { return stored_.nbytes(); }

 private:
  struct KeysValues {
    mx::array k, v;
  };

  KeysValues exactly(const KeysValues& x);
  std::optional<NearTokens> remember(KeysValues near);

  Restore restore_keys_, restore_values_;
  ExactTokens exact_;
  std::optional<Restore> exact_keys_, exact_values_;
  TokenStore stored_;                 // sinks, and restored tokens of complete groups; keys after RoPE
  std::optional<KeysValues> tail_;    // the others as they came, keys before RoPE if they are restored so
  std::optional<KeysValues> recent_;  // exact copies of the last window − 1 tokens
  int offset_ = 0;
};

/// What the quantizer of `parameters` gives back: its own code on the CPU, the same computed by MLX's operations on a GPU.
Restore make_restore(const QuantizerParameters& parameters);

/// One quantizer for each KV head, all of the same method and side; none: that head stays as it is.
Restore make_restore(const std::vector<std::optional<QuantizerParameters>>& heads);

/// Restoring caches for every layer of a plan.
CacheFactory restoring_factory(const Plan& plan);

}  // namespace veloxquant
