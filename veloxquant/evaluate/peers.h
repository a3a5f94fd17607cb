// What others store at the same bits, next to which plans are measured.
#pragma once

#include <string>
#include <vector>

#include "veloxquant/model/model.h"

namespace veloxquant {

/// A way of storing keys and values that evaluate measures.
struct Storage {
  std::string name;       // as in reports: "full", a peer's name, a plan's file name
  double effective_bits;  // per element of keys and values, everything stored per token counted
  CacheFactory factory;
};

/// Full precision: 32 bits, as the CPU engine stores them.
Storage full_storage();

/// `mlx2, 3, 4, 5, 6, 8`: exactly mx::quantize over groups of 64 channels with 16-bit scale and offset, as mlx_lm stores after
/// RoPE. `kivi1…4` (arXiv 2402.02750, without its full-precision residual): keys per channel over 32 tokens, values per token in
/// groups of 32. `turboquant1…4` (arXiv 2504.19874): random rotation and Lloyd–Max levels. Throws std::invalid_argument that lists
/// the names for another one, and where the head dimension does not suit the peer.
Storage peer_storage(const std::string& name, const ModelConfig& config);

/// All names that peer_storage takes.
std::vector<std::string> peer_names();

}  // namespace veloxquant
