#include <cmath>

#include "veloxquant/model/families/families.h"

namespace veloxquant {

// mlx_lm leaves the windows out; here every other layer slides as in transformers.
void configure_gemma2(const JsonObject& json, ModelConfig& config) {
  if (!json.has("sliding_window")) json.refuse("sliding_window", "a number of tokens");
  slide_layers(json, config, [](int layer) { return layer % 2 == 0; });
  const auto soft_cap = [&](const char* field, double otherwise) {
    return json.is_null(field) ? 0.0 : json.number_or(field, otherwise, 1e-3, 1e6);
  };
  config.activation = Activation::kGelu;
  config.norms_after = true;
  config.norm_offset = 1;
  config.attention_scale = 1 / std::sqrt(json.number("query_pre_attn_scalar", 1e-3, 1e6));
  config.attention_soft_cap = soft_cap("attn_logit_softcapping", 50);
  config.logit_soft_cap = soft_cap("final_logit_softcapping", 30);
  config.embedding_scale = std::sqrt(static_cast<double>(config.hidden_size));
}

}  // namespace veloxquant
