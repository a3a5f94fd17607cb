#include "veloxquant/model/families/families.h"

namespace veloxquant {

void configure_llama(const JsonObject& json, ModelConfig& config) {
  config.query_key_value_bias = config.attention_output_bias = json.boolean_or("attention_bias", false);
  config.mlp_bias = json.boolean_or("mlp_bias", false);
}

}  // namespace veloxquant
