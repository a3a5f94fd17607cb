#include "veloxquant/model/families/families.h"

namespace veloxquant {

// longrope: the long factors at every length, as mlx_lm does, since a cache cannot change its positions once they are told.
void configure_phi3(const JsonObject& json, ModelConfig& config) {
  slide_layers(json, config, [](int) { return true; });
  config.joined_projections = true;
  const int dims = static_cast<int>(rotary_share(json) * config.head_dim);
  if (dims % 2 != 0) json.refuse("partial_rotary_factor", "a share of head_dim that is an even number of dimensions");
  config.ropes = {read_rope(json, dims)};
}

}  // namespace veloxquant
