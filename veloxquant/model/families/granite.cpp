#include "veloxquant/model/families/families.h"

namespace veloxquant {

void configure_granite(const JsonObject& json, ModelConfig& config) {
  configure_llama(json, config);
  const auto multiplier = [&](const char* field) { return json.number_or(field, 1.0, 1e-6, 1e6); };
  config.attention_scale = multiplier("attention_multiplier");
  config.embedding_scale = multiplier("embedding_multiplier");
  config.residual_scale = multiplier("residual_multiplier");
  config.logit_scale = 1 / multiplier("logits_scaling");
}

}  // namespace veloxquant
