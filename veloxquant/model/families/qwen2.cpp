#include "veloxquant/model/families/families.h"

namespace veloxquant {

// mlx_lm leaves the window out; here layers slide as in transformers.
void configure_qwen2(const JsonObject& json, ModelConfig& config) {
  const auto first = json.integer_or("max_window_layers", config.num_layers, 0, 1 << 16);
  if (json.boolean_or("use_sliding_window", false)) slide_layers(json, config, [first](int layer) { return layer >= first; });
  config.query_key_value_bias = true;
}

}  // namespace veloxquant
