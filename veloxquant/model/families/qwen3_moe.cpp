#include <algorithm>

#include "veloxquant/model/families/families.h"

namespace veloxquant {

void configure_qwen3_moe(const JsonObject& json, ModelConfig& config) {
  configure_qwen3(json, config);
  const auto count = static_cast<int>(json.integer_or("num_experts", 128, 0, 1 << 16));
  if (count == 0) return;
  config.experts = {.count = count,
                    .per_token = static_cast<int>(json.integer_or("num_experts_per_tok", std::min(8, count), 1, count)),
                    .intermediate_size = static_cast<int>(json.integer("moe_intermediate_size", 1, 1 << 24)),
                    .normalized = json.boolean_or("norm_topk_prob", false)};
  const auto step = static_cast<int>(json.integer_or("decoder_sparse_step", 1, 1, 1 << 16));
  for (int i = 0; i < config.num_layers; ++i) config.layers[static_cast<std::size_t>(i)].experts = (i + 1) % step == 0;
  if (!json.has("mlp_only_layers")) return;
  const auto& plain = json.at("mlp_only_layers");
  if (!plain.is_array()) json.refuse("mlp_only_layers", "a list of layers");
  for (const auto& layer : plain) {
    if (!layer.is_number_integer() || layer < 0 || layer >= config.num_layers)
      json.refuse("mlp_only_layers", "layers from 0 to " + std::to_string(config.num_layers - 1));
    config.layers[layer.get<std::size_t>()].experts = false;
  }
}

}  // namespace veloxquant
