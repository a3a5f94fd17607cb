// The one seam between models and everything that is done to their keys and values.
#pragma once

#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
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

  /// What attends to the newest token: "cpu", kernels of ours; "cuda", kernels of ours; "graph", operations of MLX.
  virtual std::string kernels() const;

  /// Where that is "graph": why kernels of ours do not serve, if they could; else empty.
  virtual std::string no_kernels() const { return {}; }
};

/// Arrays that say, by name, all that a cache holds.
using CacheState = std::map<std::string, mx::array>;

/// A cache whose life is more than appending.
class SavableCache : public AttentionCache {
 public:
  /// Forgets the last `tokens` ≥ 0 tokens of each sequence, or as many as it has.  Returns by how many offset() fell.
  virtual int trim(int tokens) = 0;

  /// A copy that shares nothing with this one that either may change.
  virtual std::unique_ptr<SavableCache> clone() const = 0;

  /// Evaluated, and on the CPU.
  virtual CacheState state() const = 0;

  /// Becomes the cache of that state, whatever it held.  Throws std::invalid_argument that names what does not fit, and then holds
  /// what it did.
  virtual void restore(const CacheState& state) = 0;
};

using AttentionCaches = std::vector<std::unique_ptr<AttentionCache>>;

/// Makes the cache of one layer.
using CacheFactory = std::function<std::unique_ptr<AttentionCache>(int layer)>;

}  // namespace veloxquant
