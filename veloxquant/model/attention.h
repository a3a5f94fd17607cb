// Attention over full-precision keys and values.
#pragma once

#include <cstdint>
#include <optional>

#include "mlx/array.h"
#include "veloxquant/model/attention_cache.h"
#include "veloxquant/model/token_store.h"

namespace veloxquant {

/// Other copies of the newest tokens' keys and values: a query reads the last `window` ≥ 1 tokens up to itself here, those before
/// from the ordinary k and v.
struct NearTokens {
  int window;
  mx::array k, v;  // [B, Hkv, N, D] of the last N tokens, min(S, window + T − 1) ≤ N ≤ S
};

/// Causal grouped-query attention whose queries stand at the end of the keys: query t of T sees keys 0 … S − T + t.
/// q [B, Hq, T, D], k and v [B, Hkv, S, D] with S ≥ T and Hkv a divisor of Hq → [B, Hq, T, D].  On the CPU our own kernel in
/// float32, on a GPU MLX's; no [T, S] array exists on either.  Has gradients by q, k, v and near's k and v.  Throws
/// std::invalid_argument for a window or arrays of near outside their ranges.
mx::array causal_attention(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionSpec& spec,
                           const std::optional<NearTokens>& near = std::nullopt);

/// What causal_attention() does on a GPU: the same by MLX's operations, on any device.  Queries are handled one stretch after
/// another, so that no more than `scores_at_once` ≥ 1 scores are in memory (those of one query at least), 256 MiB of them.
mx::array causal_attention_graph(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionSpec& spec,
                                 const std::optional<NearTokens>& near = std::nullopt, std::int64_t scores_at_once = 1 << 26);

/// A cache that stores keys (after RoPE) and values as they are.  Its state: keys and values [B, H, offset, D], nothing before the
/// first token.
class FullCache : public SavableCache {
 public:
  mx::array attend(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionSpec& spec) override;
  int offset() const override { return store_.size(); }
  std::size_t nbytes() const override { return store_.nbytes(); }
  int trim(int tokens) override;
  std::unique_ptr<SavableCache> clone() const override;
  CacheState state() const override;
  void restore(const CacheState& state) override;

  static CacheFactory factory();

 private:
  TokenStore store_;
};

}  // namespace veloxquant
