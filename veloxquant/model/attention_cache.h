// The one seam between models and everything that is done to their keys and values.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "mlx/array.h"
#include "veloxquant/model/rope.h"

namespace veloxquant {

/// What a layer asks of attention beyond its queries, keys and values.
struct AttentionSpec {
  float scale = 1.0f;                               // of q·k, before the softmax
  const Rope* rope = nullptr;                       // never null in a call; turns queries and keys by their positions
  float soft_cap = 0.0f;                            // c > 0: a score s becomes c·tanh(s / c)
  int sliding_window = 0;                           // n > 0: a query sees only the last n tokens up to itself
  std::optional<mx::array> padding = std::nullopt;  // int32 [B]: so many tokens at a sequence's begin that nobody sees
};

/// Keys and values of one layer in use; owns attention over what it stores.  The model never knows what is behind it.
class AttentionCache {
 public:
  virtual ~AttentionCache() = default;

  /// Appends T tokens and attends: query t sees every token up to itself.
  /// q [B, Hq, T, D], k and v [B, Hkv, T, D], before RoPE; result [B, Hq, T, D].  B, Hkv and D stay what the first call gave.
  virtual mx::array attend(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionSpec& spec) = 0;

  /// Tokens appended so far.
  virtual int offset() const = 0;

  /// Bytes that the stored tokens take.
  virtual std::size_t nbytes() const = 0;

  /// Arrays in which tokens are stored and that may still have to be evaluated, for whoever does not evaluate what attend()
  /// returns.
  virtual std::vector<mx::array> pending() const { return {}; }
};

using AttentionCaches = std::vector<std::unique_ptr<AttentionCache>>;

/// Makes the cache of one layer.
using CacheFactory = std::function<std::unique_ptr<AttentionCache>(int layer)>;

}  // namespace veloxquant
