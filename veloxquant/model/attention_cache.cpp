#include "veloxquant/model/attention_cache.h"

#include "veloxquant/model/cpu_operation.h"

namespace veloxquant {

std::string AttentionCache::kernels() const {
  return own_kernels() ? "cpu" : "graph";
}

}  // namespace veloxquant
