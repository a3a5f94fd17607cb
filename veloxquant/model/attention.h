// Attention over full-precision keys and values.
#pragma once

#include "mlx/array.h"
#include "veloxquant/model/attention_cache.h"
#include "veloxquant/model/token_store.h"

namespace veloxquant {

/// Causal grouped-query attention whose queries stand at the end of the keys: query t of T sees keys 0 … S − T + t.
/// q [B, Hq, T, D], k and v [B, Hkv, S, D] with S ≥ T and Hkv a divisor of Hq → [B, Hq, T, D].  On the CPU our own kernel in
/// float32, without a [T, S] array; on a GPU MLX's.
mx::array causal_attention(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionSpec& spec);

/// A cache that stores keys (after RoPE) and values as they are.
class FullCache : public AttentionCache {
 public:
  mx::array attend(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionSpec& spec) override;
  int offset() const override { return store_.size(); }
  std::size_t nbytes() const override { return store_.nbytes(); }

  static CacheFactory factory();

 private:
  TokenStore store_;
};

}  // namespace veloxquant
