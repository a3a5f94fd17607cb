#include "veloxquant/model/families/families.h"

namespace veloxquant {

void configure_smollm3(const JsonObject& json, ModelConfig& config) {
  configure_llama(json, config);
  if (json.boolean_or("use_sliding_window", false)) slide_layers(json, config, [](int) { return true; });
  config.ropes = {read_rope(json, config.head_dim), RopeConfig{.factors = {}, .dims = 0}};
  const auto interval = json.integer_or("no_rope_layer_interval", 4, 1, 1 << 16);
  for (int i = 0; i < config.num_layers; ++i) config.layers[static_cast<std::size_t>(i)].rope = (i + 1) % interval == 0 ? 1 : 0;
  if (!json.has("no_rope_layers")) return;
  const auto& turns = json.at("no_rope_layers");  // 1: the layer has RoPE
  if (!turns.is_array() || turns.size() != config.layers.size())
    json.refuse("no_rope_layers", "a list of " + std::to_string(config.num_layers) + " numbers, 1 or 0");
  for (std::size_t i = 0; i < turns.size(); ++i) {
    if (turns[i] != 0 && turns[i] != 1) json.refuse("no_rope_layers", "1 or 0 for each layer");
    config.layers[i].rope = turns[i] == 1 ? 0 : 1;
  }
}

}  // namespace veloxquant
