#include "veloxquant/model/families/families.h"

namespace veloxquant {

void configure_mixtral(const JsonObject& json, ModelConfig& config) {
  slide_layers(json, config, [](int) { return true; });
  const auto count = static_cast<int>(json.integer("num_local_experts", 1, 1 << 16));
  config.experts = {.count = count,
                    .per_token = static_cast<int>(json.integer("num_experts_per_tok", 1, count)),
                    .intermediate_size = config.intermediate_size,
                    .normalized = true,
                    .block = "block_sparse_moe.",
                    .gate = "w1",
                    .up = "w3",
                    .down = "w2"};
  for (auto& layer : config.layers) layer.experts = true;
}

}  // namespace veloxquant
