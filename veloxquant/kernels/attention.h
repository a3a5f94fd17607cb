// Causal grouped-query attention in float32.
#pragma once

#include <cstddef>

#include "veloxquant/kernels/strided.h"

namespace veloxquant {

/// Queries stand at the end of the keys: query t of query_tokens sees keys 0 … key_tokens − query_tokens + t.
/// query_heads is a multiple of kv_heads; query heads g·i … g·i + g − 1 share KV head i (g = query_heads / kv_heads).
struct AttentionShape {
  std::size_t batch, query_heads, kv_heads, query_tokens, key_tokens, head_dim;
};

/// out = softmax(scale · q·kᵀ) · v.  q and out [batch, query_heads, query_tokens, head_dim], k and v
/// [batch, kv_heads, key_tokens, head_dim]; out overlaps nothing.
///
/// Blocks of queries by blocks of keys with a running maximum and sum (FlashAttention, arXiv 2205.14135), so that no
/// [query_tokens, key_tokens] array exists.
void causal_attention(const AttentionShape& shape, float scale, StridedView q, StridedView k, StridedView v,
                      MutableStridedView out);

namespace reference {
void causal_attention(const AttentionShape& shape, float scale, StridedView q, StridedView k, StridedView v,
                      MutableStridedView out);
}

}  // namespace veloxquant
