#include <algorithm>
#include <cmath>
#include <vector>

#include "veloxquant/kernels/attention.h"

namespace veloxquant::reference {
namespace {

double dot(const float* a, const float* b, std::size_t dim) {
  double sum = 0;
  for (std::size_t i = 0; i < dim; ++i) sum += static_cast<double>(a[i]) * b[i];
  return sum;
}

double capped(double score, double cap) {
  return cap > 0 ? cap * std::tanh(score / cap) : score;
}

// What stands for key s in one of the arrays that hold keys or values, for a query that sees the keys up to `end`.
template <class T>
T* row_of(const AttentionShape& shape, const NearKeys& near, const Strided<T>& far_rows, const Strided<T>& near_rows, std::size_t b,
          std::size_t kv, std::size_t s, std::size_t end) {
  return s + near.window < end ? far_rows.at(b, kv, s) : near_rows.at(b, kv, s + near.tokens - shape.key_tokens);
}

// Of one query: weights of the keys that it sees, and log Σ e^score.
struct Softmax {
  KeyRange seen;
  std::vector<double> weights;
  double log_sum = 0;

  Softmax(const AttentionShape& shape, const AttentionRule& rule, std::size_t b, std::size_t h, std::size_t t, StridedView q,
          StridedView k, const NearKeys& near)
      : seen(visible_keys(shape, rule, b, t)) {
    const std::size_t kv = h / (shape.query_heads / shape.kv_heads);
    for (std::size_t s = seen.begin; s < seen.end; ++s)
      weights.push_back(capped(rule.scale * dot(q.at(b, h, t), row_of(shape, near, k, near.k, b, kv, s, seen.end), shape.head_dim),
                               rule.soft_cap));
    if (weights.empty()) return;
    const double top = *std::max_element(weights.begin(), weights.end());
    double sum = 0;
    for (auto& weight : weights) sum += weight = std::exp(weight - top);
    for (auto& weight : weights) weight /= sum;
    log_sum = top + std::log(sum);
  }
};

template <class Body>
void for_each_query(const AttentionShape& shape, Body body) {
  for (std::size_t b = 0; b < shape.batch; ++b)
    for (std::size_t h = 0; h < shape.query_heads; ++h)
      for (std::size_t t = 0; t < shape.query_tokens; ++t) body(b, h, t);
}

void clear(const MutableStridedView& x, std::size_t batch, std::size_t heads, std::size_t tokens, std::size_t dim) {
  for (std::size_t b = 0; b < batch; ++b)
    for (std::size_t h = 0; h < heads; ++h)
      for (std::size_t t = 0; t < tokens; ++t) std::fill_n(x.at(b, h, t), dim, 0.0f);
}

void add_scaled(double factor, const float* x, std::size_t dim, float* sum) {
  for (std::size_t i = 0; i < dim; ++i) sum[i] = static_cast<float>(sum[i] + factor * x[i]);
}

}  // namespace

void causal_attention(const AttentionShape& shape, const AttentionRule& rule, StridedView q, StridedView k, StridedView v,
                      MutableStridedView out, float* log_sums, const NearKeys& near) {
  for_each_query(shape, [&](std::size_t b, std::size_t h, std::size_t t) {
    const std::size_t kv = h / (shape.query_heads / shape.kv_heads);
    const Softmax softmax(shape, rule, b, h, t, q, k, near);
    for (std::size_t i = 0; i < shape.head_dim; ++i) {
      double value = 0;
      for (std::size_t s = softmax.seen.begin; s < softmax.seen.end; ++s)
        value += softmax.weights[s - softmax.seen.begin] * row_of(shape, near, v, near.v, b, kv, s, softmax.seen.end)[i];
      out.at(b, h, t)[i] = static_cast<float>(value);
    }
    if (log_sums) log_sums[(b * shape.query_heads + h) * shape.query_tokens + t] = static_cast<float>(softmax.log_sum);
  });
}

// With p the weights and o = Σ p·v:  ∂/∂v = p·g,  ∂/∂score = p·(g·v − g·o).
void causal_attention_backward(const AttentionShape& shape, const AttentionRule& rule, StridedView q, StridedView k, StridedView v,
                               StridedView out, const float*, StridedView grad_out, MutableStridedView grad_q,
                               MutableStridedView grad_k, MutableStridedView grad_v, const NearKeys& near,
                               MutableStridedView grad_near_k, MutableStridedView grad_near_v) {
  const std::size_t dim = shape.head_dim;
  clear(grad_q, shape.batch, shape.query_heads, shape.query_tokens, dim);
  clear(grad_k, shape.batch, shape.kv_heads, shape.key_tokens, dim);
  clear(grad_v, shape.batch, shape.kv_heads, shape.key_tokens, dim);
  clear(grad_near_k, shape.batch, shape.kv_heads, near.tokens, dim);
  clear(grad_near_v, shape.batch, shape.kv_heads, near.tokens, dim);
  for_each_query(shape, [&](std::size_t b, std::size_t h, std::size_t t) {
    const std::size_t kv = h / (shape.query_heads / shape.kv_heads);
    const Softmax softmax(shape, rule, b, h, t, q, k, near);
    const float* g = grad_out.at(b, h, t);
    const double expected = dot(g, out.at(b, h, t), dim);
    for (std::size_t s = softmax.seen.begin; s < softmax.seen.end; ++s) {
      const auto row = [&, end = softmax.seen.end](const auto& far_rows, const auto& near_rows) {
        return row_of(shape, near, far_rows, near_rows, b, kv, s, end);
      };
      const double weight = softmax.weights[s - softmax.seen.begin];
      double slope = rule.scale;
      if (rule.soft_cap > 0) {
        const double tanh = std::tanh(rule.scale * dot(q.at(b, h, t), row(k, near.k), dim) / rule.soft_cap);
        slope *= 1 - tanh * tanh;
      }
      const double gain = weight * (dot(g, row(v, near.v), dim) - expected) * slope;
      add_scaled(weight, g, dim, row(grad_v, grad_near_v));
      add_scaled(gain, row(k, near.k), dim, grad_q.at(b, h, t));
      add_scaled(gain, q.at(b, h, t), dim, row(grad_k, grad_near_k));
    }
  });
}

}  // namespace veloxquant::reference
