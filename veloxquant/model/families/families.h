// The table of model families.  A new one is its own file and a row here (docs/add_a_model.md).
#pragma once

#include <span>
#include <string_view>

#include "veloxquant/core/json.h"
#include "veloxquant/model/config.h"

namespace veloxquant {

struct Family {
  std::string_view model_type;  // of config.json

  /// Sets what the family adds to the plain decoder, from config.json's fields; refuses by name what it cannot do.
  void (*configure)(const JsonObject& json, ModelConfig& config);
};

void configure_llama(const JsonObject& json, ModelConfig& config);
void configure_qwen2(const JsonObject& json, ModelConfig& config);
void configure_qwen3(const JsonObject& json, ModelConfig& config);

std::span<const Family> families();

}  // namespace veloxquant
