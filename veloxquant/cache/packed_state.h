// What a packed cache holds, as arrays: the same for every kind of packed cache, in memory, in files and in Python.
#pragma once

#include <atomic>
#include <functional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "veloxquant/model/attention_cache.h"

namespace veloxquant {

/// A cache of codes: sequences of one batch, each with as many tokens as it has.
///
/// Its state, with B sequences and H KV heads:
///
/// - offset, int32 []: offset(), the tokens appended, padding included;
/// - tokens, int32 [B]: of each sequence, without padding;
/// - coded, int32 [B]: how many of these are codes, behind the sinks;
/// - blocks, uint8 [B, blocks, bytes]: of each KV head a block of its keys, then one of its values (packed_layout.h; patches
///   behind the codes);
/// - patch_errors, float32 [B, H, 2, patches]: of keys and values, what the tokens patched in the last block have lost, in the
///   order of the patches; as many as the unit with most patches has, zeros behind;
/// - sinks, uint8 [B, H, 2, sinks, bytes]: 8-bit codes of the first tokens;
/// - window, uint8 [B, H, 2, window, bytes]: 8-bit codes of the tokens behind the codes, that at position p in slot p % window.
///
/// Sequences with fewer blocks than others have blocks that nobody reads.  A cache that no token has come to knows offset and
/// tokens only.
///
/// A token of which the window no longer has the 8 bits stays as the codes that it has become, also where trim() brings it back
/// into the window: the window then begins behind it, and fills again before another token is encoded.
class PackedAttentionCache : public SavableCache {
 public:
  /// spec.padding [B]: sequence b has offset() − padding[b] tokens after the call, so that the last of the T are its own; their
  /// positions count from its first token.  It may grow from call to call.  Without padding all T are everyone's.
  mx::array attend(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionSpec& spec) override = 0;

  /// Of each sequence, without padding; of none before the first call.
  virtual std::vector<int> tokens() const = 0;
};

// What kinds of packed caches share.

/// Whether a cache is in use; a copy of it is not.
class Busy {
 public:
  Busy() = default;
  Busy(const Busy&) noexcept {}
  Busy& operator=(const Busy&) noexcept { return *this; }

 private:
  friend class InUse;
  std::atomic<bool> now_ = false;
};

/// Held while it is.  Throws std::logic_error if it is already.
class InUse {
 public:
  explicit InUse(Busy& busy) : busy_(busy) {
    if (busy_.now_.exchange(true)) throw std::logic_error("[packed cache] used from two threads at once");
  }
  ~InUse() { busy_.now_ = false; }
  InUse(const InUse&) = delete;
  InUse& operator=(const InUse&) = delete;

 private:
  Busy& busy_;
};

/// int32 [values], evaluated, and on the CPU.
mx::array int_array(std::span<const int> values);

/// Throws std::invalid_argument unless there are KV heads, and as many units of keys and of values, or one of each; …
void check_units(int kv_heads, std::size_t key_units, std::size_t value_units);

/// … unless `k`, the first that a cache is given, is of so many heads and dimensions; …
void check_units(const mx::array& k, std::size_t key_units, std::size_t value_units, int dim);

/// … and unless k and v are of the expected shape [batch, kv_heads, tokens, dim], with something in it, and q has queries for them.
void check_chunk(const mx::array& q, const mx::array& k, const mx::array& v, const mx::Shape& expected);

/// How many of `came` tokens, the last, are each sequence's, as spec.padding says for a cache of that offset whose sequences have
/// so many tokens.  Throws std::invalid_argument for padding that contradicts them.
std::vector<int> own_tokens(const std::vector<int>& tokens, int offset, int came, const AttentionSpec& spec);

/// Of the arrays of a state.
struct StateSizes {
  int heads, block_bytes, patches, sinks, window, token_bytes;
};

/// `coded` is empty where no token has come.
struct StateCounts {
  int offset;
  std::vector<int> tokens, coded;
};

/// The part of a state that counts, …
CacheState counting_state(const StateCounts& counts);

/// … and all of it, where any token has come: what tokens are stored as is zeros.
CacheState blank_state(const StateCounts& counts, const StateSizes& sizes);

// States that are given are evaluated, and on the CPU, as state() has them.

/// Throws std::invalid_argument that names what is not as a state of these sizes has it.  `sizes` of so many KV heads, which may
/// throw, is not called where no token has come.
StateCounts check_state(const CacheState& state, const std::function<StateSizes(int heads)>& sizes);

/// The state of these sequences, in this order.  Throws std::invalid_argument for one that is not there.
CacheState select_sequences(const CacheState& state, const std::vector<int>& sequences);

/// The sequences of all, one after another, each with the tokens that it has.  Throws std::invalid_argument for states of caches of
/// other shapes.
CacheState join_sequences(std::span<const CacheState> states);

/// A cache that no token has come to, of so many sequences.
CacheState empty_state(int sequences);

/// SHA-256, in hex, over a text and the names, types, shapes and bytes of the arrays.
std::string checksum(std::string_view text, const CacheState& state);

}  // namespace veloxquant
