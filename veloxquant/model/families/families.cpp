#include "veloxquant/model/families/families.h"

namespace veloxquant {

std::span<const Family> families() {
  static constexpr Family kTable[] = {
      {"gemma2", configure_gemma2},   {"gemma3_text", configure_gemma3_text},
      {"granite", configure_granite}, {"llama", configure_llama},
      {"mistral", configure_mistral}, {"mixtral", configure_mixtral},
      {"phi3", configure_phi3},       {"qwen2", configure_qwen2},
      {"qwen3", configure_qwen3},     {"qwen3_moe", configure_qwen3_moe},
      {"smollm3", configure_smollm3},
  };
  return kTable;
}

}  // namespace veloxquant
