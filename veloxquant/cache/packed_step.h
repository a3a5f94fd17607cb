// What a call of a packed cache does on the CPU, when its graph is evaluated.
#pragma once

#include <cstddef>
#include <vector>

#include "mlx/array.h"
#include "veloxquant/cache/packed_layer.h"

namespace veloxquant {

/// What a call does to a sequence: it has `first` tokens and `coded_before` codes, and then `tokens` more and `coded` codes.  Of
/// the tokens that come, the first `skipped` are padding.
struct SequenceStep {
  std::size_t first, coded_before, skipped, tokens, coded;

  std::size_t position(std::size_t token) const { return first + token - skipped; }
};

/// Appends k and v [B, KV heads, T, D] to `sequences` [B] and fills out [B, T, H, D] with the attention of q [B, H, T, D], which is
/// turned by its positions; k is so unless the layer stores keys before that.  All are evaluated, float32.  Throws std::logic_error
/// where a sequence is not what its step begins with.  Where it throws, no sequences are left.
void packed_step(const PackedLayer& layer, const std::vector<SequenceStep>& steps, const AttentionSpec& spec, const mx::array& q,
                 const mx::array& k, const mx::array& v, std::vector<PackedSequence>& sequences, mx::array& out);

/// Throws the std::logic_error of a cache whose last call failed.
[[noreturn]] void throw_incomplete();

}  // namespace veloxquant
