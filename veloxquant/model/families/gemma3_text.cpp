#include <bit>
#include <cmath>
#include <cstdint>

#include "veloxquant/model/families/families.h"

namespace veloxquant {
namespace {

float round_to_bfloat16(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  return std::bit_cast<float>((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u);
}

}  // namespace

// Layers that slide tell positions by a base of their own.
void configure_gemma3_text(const JsonObject& json, ModelConfig& config) {
  if (!json.has("sliding_window")) json.refuse("sliding_window", "a number of tokens");
  if (json.boolean_or("use_bidirectional_attention", false)) json.refuse("use_bidirectional_attention", "false");
  const auto pattern = json.integer_or("sliding_window_pattern", 6, 1, 1 << 16);
  const auto slides = [&](int layer) {
    if (json.has("layer_types")) return json.at("layer_types")[static_cast<std::size_t>(layer)] == "sliding_attention";
    return (layer + 1) % pattern != 0;
  };
  slide_layers(json, config, slides);
  RopeConfig whole{.theta = json.number_or("rope_theta", 1e6, 1e-3, 1e12), .factors = {}, .dims = config.head_dim},
      local{.theta = json.number_or("rope_local_base_freq", 1e4, 1e-3, 1e12), .factors = {}, .dims = config.head_dim};
  if (json.has("rope_scaling")) whole = scale_rope(json.object("rope_scaling"), json, whole);
  if (json.has("rope_parameters")) {
    const JsonObject parameters = json.object("rope_parameters");
    whole = scale_rope(parameters.object("full_attention"), json, whole);
    local = scale_rope(parameters.object("sliding_attention"), json, local);
  }
  config.ropes = {whole, local};
  for (int i = 0; i < config.num_layers; ++i) config.layers[static_cast<std::size_t>(i)].rope = slides(i) ? 1 : 0;
  config.activation = Activation::kGelu;
  config.query_key_norm = true;
  config.norms_after = true;
  config.norm_offset = 1;
  config.attention_scale = 1 / std::sqrt(json.number_or("query_pre_attn_scalar", 256, 1e-3, 1e6));
  if (json.has("attn_logit_softcapping")) config.attention_soft_cap = json.number("attn_logit_softcapping", 1e-3, 1e6);
  if (json.has("final_logit_softcapping")) config.logit_soft_cap = json.number("final_logit_softcapping", 1e-3, 1e6);
  config.embedding_scale = round_to_bfloat16(std::sqrt(static_cast<float>(config.hidden_size)));  // as in training
}

}  // namespace veloxquant
