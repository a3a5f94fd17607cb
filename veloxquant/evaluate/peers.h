// What others store at the same bits, next to which plans are measured.
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

#include "veloxquant/core/progress.h"
#include "veloxquant/model/language_model.h"
#include "veloxquant/plan/plan.h"

namespace veloxquant {

/// A way of storing keys and values that evaluate measures.
struct Storage {
  std::string name;  // as in reports: "full", a peer's name, a plan's file name
  CacheFactory factory;

  /// Bits per element of keys and values with `context` ≥ 1 tokens in the cache: everything stored per token counts.
  std::function<double(int context)> effective_bits;

  std::size_t constant_bytes = 0;          // what does not grow with the tokens: codebooks and the like
  std::vector<SlidingLayer> sliding = {};  // layers of which the last tokens are kept as they are, beside those bits
};

/// Full precision: 32 bits, as the CPU engine stores them.
Storage full_storage();

/// What a plan stores: restored as it would be read, or really packed (on the CPU; KIVI cannot be).
Storage plan_storage(const std::string& name, const Plan& plan, bool packed = false);

/// `mlx2, 3, 4, 5, 6, 8`: exactly mx::quantize over groups of 64 channels with 16-bit scale and offset, as mlx_lm stores after
/// RoPE. `kivi1…4` (arXiv 2402.02750, without its full-precision residual): keys per channel over 32 tokens, values per token in
/// groups of 32. `turboquant1…4` (arXiv 2504.19874): random rotation and Lloyd–Max levels.  `vecinfer1, 2, 4` (arXiv 2510.06175 in
/// its documented shapes, keys and values): a plan of 256 centroids and head_dim · bits / 8 sub-spaces a layer, fitted for some
/// seconds to own text of a fixed seed, which evaluation never reads.  All but vecinfer also as NAME+window: the last 32 tokens
/// and the first 4 stay at 8 bits.
///
/// Throws std::invalid_argument that lists the names for another one, and where the head dimension does not suit the peer.
Storage peer_storage(const std::string& name, const LanguageModel& model, const ProgressCallback& progress = {});

/// All names that peer_storage takes; those with "+window" last.
std::vector<std::string> peer_names();

/// Bits per element where `exact_tokens` of `context` tokens take exact_bits (exact_parameters: 8.5 with heads of 64, 128, …) and
/// the others, n of them, bits(n).
double windowed_bits(const std::function<double(int)>& bits, double exact_bits, int context, int exact_tokens);

}  // namespace veloxquant
