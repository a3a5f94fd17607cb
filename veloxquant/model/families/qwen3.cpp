#include "veloxquant/core/error.h"
#include "veloxquant/model/families/families.h"

namespace veloxquant {

void configure_qwen3(const JsonObject& json, ModelConfig& config) {
  if (json.boolean_or("use_sliding_window", false))
    throw_failure("config", "{}: use_sliding_window: expected false, got true: sliding windows are not supported", json.where());
  config.query_key_value_bias = config.attention_output_bias = json.boolean_or("attention_bias", false);
  config.query_key_norm = true;
}

}  // namespace veloxquant
