#include "veloxquant/model/families/families.h"

namespace veloxquant {

void configure_qwen3(const JsonObject& json, ModelConfig& config) {
  configure_qwen2(json, config);
  config.query_key_value_bias = config.attention_output_bias = json.boolean_or("attention_bias", false);
  config.query_key_norm = true;
}

}  // namespace veloxquant
