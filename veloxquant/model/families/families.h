// The table of model families.  A new one is its own file and a row here (docs/add_a_model.md).
#pragma once

#include <functional>
#include <span>
#include <string_view>

#include "veloxquant/core/json.h"
#include "veloxquant/model/config.h"

namespace veloxquant {

struct Family {
  std::string_view model_type;  // of config.json

  /// Sets what the family adds to the plain decoder, from config.json's fields; refuses by name what it cannot do.  Where it leaves
  /// ModelConfig::ropes empty, all layers turn whole heads as rope_theta and rope_scaling say.
  void (*configure)(const JsonObject& json, ModelConfig& config);
};

void configure_gemma2(const JsonObject& json, ModelConfig& config);
void configure_gemma3_text(const JsonObject& json, ModelConfig& config);
void configure_granite(const JsonObject& json, ModelConfig& config);
void configure_llama(const JsonObject& json, ModelConfig& config);
void configure_mistral(const JsonObject& json, ModelConfig& config);
void configure_mixtral(const JsonObject& json, ModelConfig& config);
void configure_phi3(const JsonObject& json, ModelConfig& config);
void configure_qwen2(const JsonObject& json, ModelConfig& config);
void configure_qwen3(const JsonObject& json, ModelConfig& config);
void configure_qwen3_moe(const JsonObject& json, ModelConfig& config);
void configure_smollm3(const JsonObject& json, ModelConfig& config);

std::span<const Family> families();

// For families.

/// Gives sliding_window, where the config has one and no layer_types, to the layers that slide.
void slide_layers(const JsonObject& json, ModelConfig& config, const std::function<bool(int layer)>& slides);

/// partial_rotary_factor, of rope_parameters or of the top: which share of a head turns.
double rotary_share(const JsonObject& json);

/// rope_theta and rope_scaling, or rope_parameters, for the first `dims` of a head's dimensions.
RopeConfig read_rope(const JsonObject& json, int dims);

/// `rope` as a rope_scaling object changes it; json: the whole config.
RopeConfig scale_rope(const JsonObject& scaling, const JsonObject& json, RopeConfig rope);

}  // namespace veloxquant
