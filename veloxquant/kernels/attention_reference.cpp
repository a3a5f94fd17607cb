#include <algorithm>
#include <cmath>
#include <vector>

#include "veloxquant/kernels/attention.h"

namespace veloxquant::reference {
namespace {

void attend_one(const AttentionShape& shape, float scale, std::size_t b, std::size_t h, std::size_t t, StridedView q, StridedView k,
                StridedView v, MutableStridedView out) {
  const std::size_t kv = h / (shape.query_heads / shape.kv_heads), visible = shape.key_tokens - shape.query_tokens + t + 1;
  std::vector<double> weights(visible);
  for (std::size_t s = 0; s < visible; ++s) {
    for (std::size_t i = 0; i < shape.head_dim; ++i) weights[s] += static_cast<double>(q.at(b, h, t)[i]) * k.at(b, kv, s)[i];
    weights[s] *= scale;
  }
  const double top = *std::max_element(weights.begin(), weights.end());
  double sum = 0;
  for (auto& weight : weights) sum += weight = std::exp(weight - top);
  for (std::size_t i = 0; i < shape.head_dim; ++i) {
    double value = 0;
    for (std::size_t s = 0; s < visible; ++s) value += weights[s] * v.at(b, kv, s)[i];
    out.at(b, h, t)[i] = static_cast<float>(value / sum);
  }
}

}  // namespace

void causal_attention(const AttentionShape& shape, float scale, StridedView q, StridedView k, StridedView v,
                      MutableStridedView out) {
  for (std::size_t b = 0; b < shape.batch; ++b)
    for (std::size_t h = 0; h < shape.query_heads; ++h)
      for (std::size_t t = 0; t < shape.query_tokens; ++t) attend_one(shape, scale, b, h, t, q, k, v, out);
}

}  // namespace veloxquant::reference
