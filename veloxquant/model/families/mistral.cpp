#include "veloxquant/model/families/families.h"

namespace veloxquant {

// mlx_lm loads it as a llama, without the window; the window here is that of transformers.
void configure_mistral(const JsonObject& json, ModelConfig& config) {
  slide_layers(json, config, [](int) { return true; });
}

}  // namespace veloxquant
