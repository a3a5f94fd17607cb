#include "veloxquant/core/error.h"
#include "veloxquant/model/families/families.h"

namespace veloxquant {

void configure_qwen2(const JsonObject& json, ModelConfig& config) {
  if (json.boolean_or("use_sliding_window", false))
    throw_failure("config", "{}: use_sliding_window: expected false, got true: sliding windows are not supported", json.where());
  config.query_key_value_bias = true;
}

}  // namespace veloxquant
