#include "veloxquant/model/families/families.h"

namespace veloxquant {

std::span<const Family> families() {
  static constexpr Family kTable[] = {
      {"llama", configure_llama},
      {"qwen2", configure_qwen2},
      {"qwen3", configure_qwen3},
  };
  return kTable;
}

}  // namespace veloxquant
