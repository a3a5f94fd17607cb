// Causal grouped-query attention in float32.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "veloxquant/kernels/strided.h"

namespace veloxquant {

/// Queries stand at the end of the keys: query t of query_tokens stands at the position of key key_tokens − query_tokens + t.
/// query_heads is a multiple of kv_heads; query heads g·i … g·i + g − 1 share KV head i (g = query_heads / kv_heads).
struct AttentionShape {
  std::size_t batch, query_heads, kv_heads, query_tokens, key_tokens, head_dim;
};

/// What a score is, and which keys a query sees.
struct AttentionRule {
  float scale = 1.0f;                     // score = scale · q·k
  float soft_cap = 0.0f;                  // c > 0: a score s becomes c·tanh(s / c) (Gemma 2, arXiv 2408.00118)
  std::size_t window = 0;                 // n > 0: a query sees only the last n keys up to its own position
  const std::int32_t* padding = nullptr;  // [batch] or null: so many keys at a sequence's begin that nobody sees
};

struct KeyRange {
  std::size_t begin, end;
};

/// The keys that query `t` of sequence `b` sees; none (begin = end) where all of them are padding.
inline KeyRange visible_keys(const AttentionShape& shape, const AttentionRule& rule, std::size_t b, std::size_t t) {
  const std::size_t end = shape.key_tokens - shape.query_tokens + t + 1;
  std::size_t begin = rule.window > 0 && end > rule.window ? end - rule.window : 0;
  if (rule.padding) begin = std::max(begin, std::min(static_cast<std::size_t>(std::max(rule.padding[b], 0)), end));
  return {begin, end};
}

/// Other copies of the newest keys and values, such as those that a cache has not yet quantised.  Of the keys that a query sees it
/// reads the last `window` up to its own position here (the near ones), the others from the ordinary k and v (the far ones).
struct NearKeys {
  std::size_t window = 0;  // 0: no query reads here
  std::size_t tokens = 0;  // min(key_tokens, window + query_tokens − 1) … key_tokens; 0 where window is 0
  StridedView k{}, v{};    // [batch, kv_heads, tokens, head_dim]: of the last `tokens` keys
};

/// out = softmax(scores) · v over the keys that each query sees, zero where it sees none.  q and out
/// [batch, query_heads, query_tokens, head_dim], k and v [batch, kv_heads, key_tokens, head_dim]; out overlaps nothing.
/// log_sums [batch, query_heads, query_tokens] or null: log Σ e^score of each query, 0 where it sees none.
///
/// Blocks of queries by blocks of keys with a running maximum and sum (FlashAttention, arXiv 2205.14135), so that no
/// [query_tokens, key_tokens] array exists.  Near keys cost a block of 128 queries about as much as window + 128 more keys.
void causal_attention(const AttentionShape& shape, const AttentionRule& rule, StridedView q, StridedView k, StridedView v,
                      MutableStridedView out, float* log_sums, const NearKeys& near = {});

/// What a loss gains by q, k and v when it gains grad_out by out: gradients of the shapes of q, k and v, which overlap nothing.
/// out and log_sums as causal_attention gave them.  Where near.window > 0, k and v gain only by the queries that read them as far
/// keys, and grad_near_k and grad_near_v, of the shape of near's, by the others.
void causal_attention_backward(const AttentionShape& shape, const AttentionRule& rule, StridedView q, StridedView k, StridedView v,
                               StridedView out, const float* log_sums, StridedView grad_out, MutableStridedView grad_q,
                               MutableStridedView grad_k, MutableStridedView grad_v, const NearKeys& near = {},
                               MutableStridedView grad_near_k = {}, MutableStridedView grad_near_v = {});

namespace reference {
void causal_attention(const AttentionShape& shape, const AttentionRule& rule, StridedView q, StridedView k, StridedView v,
                      MutableStridedView out, float* log_sums, const NearKeys& near = {});
void causal_attention_backward(const AttentionShape& shape, const AttentionRule& rule, StridedView q, StridedView k, StridedView v,
                               StridedView out, const float* log_sums, StridedView grad_out, MutableStridedView grad_q,
                               MutableStridedView grad_k, MutableStridedView grad_v, const NearKeys& near = {},
                               MutableStridedView grad_near_k = {}, MutableStridedView grad_near_v = {});
}  // namespace reference

}  // namespace veloxquant
