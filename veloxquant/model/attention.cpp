#include "veloxquant/model/attention.h"

#include "mlx/fast.h"
#include "mlx/ops.h"
#include "veloxquant/kernels/attention.h"
#include "veloxquant/model/cpu_operation.h"

namespace veloxquant {

namespace {

// Which of S keys each of T queries sees: bool [B or 1, 1, T, S].
mx::array seen_keys(int queries, int keys, const AttentionSpec& spec) {
  const auto key = mx::reshape(mx::arange(keys), {1, 1, 1, keys});
  const auto query = mx::reshape(mx::arange(keys - queries, keys, mx::int32), {1, 1, queries, 1});
  auto seen = mx::less_equal(key, query);
  if (spec.sliding_window > 0) seen = mx::logical_and(seen, mx::greater(key, mx::subtract(query, mx::array(spec.sliding_window))));
  if (spec.padding) seen = mx::logical_and(seen, mx::greater_equal(key, mx::reshape(*spec.padding, {-1, 1, 1, 1})));
  return seen;
}

// By MLX's operations, on any device.
mx::array attention_graph(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionSpec& spec) {
  const bool plain = spec.sliding_window == 0 && !spec.padding;
  if (spec.soft_cap == 0 && plain) return mx::fast::scaled_dot_product_attention(q, k, v, spec.scale, "causal");
  const int batch = q.shape(0), heads = q.shape(1), kv_heads = k.shape(1), queries = q.shape(2), keys = k.shape(2),
            dim = q.shape(3);
  const auto grouped = mx::reshape(q, {batch, kv_heads, heads / kv_heads, queries, dim});
  auto scores = mx::multiply(mx::matmul(grouped, mx::swapaxes(mx::expand_dims(k, 2), -1, -2)), mx::array(spec.scale));
  if (spec.soft_cap > 0) scores = mx::multiply(mx::tanh(mx::divide(scores, mx::array(spec.soft_cap))), mx::array(spec.soft_cap));
  const auto seen = mx::expand_dims(seen_keys(queries, keys, spec), 2);
  // Finite, so that a query that sees nothing has weights, which the mask then takes away.
  const auto weights = mx::softmax(mx::where(seen, scores, mx::array(-1e30f)), -1, /* precise= */ true);
  const auto out = mx::matmul(mx::where(seen, weights, mx::array(0.0f)), mx::expand_dims(v, 2));
  return mx::reshape(out, q.shape());
}

AttentionShape shape_of(const mx::array& q, const mx::array& k) {
  const auto size = [](const mx::array& x, int axis) { return static_cast<std::size_t>(x.shape(axis)); };
  return {size(q, 0), size(q, 1), size(k, 1), size(q, 2), size(k, 2), size(q, 3)};
}

// `padding`: the index of the input that holds it, if any does.
AttentionRule rule_of(const AttentionSpec& spec, const std::vector<mx::array>& inputs, std::size_t padding) {
  return {.scale = spec.scale,
          .soft_cap = spec.soft_cap,
          .window = static_cast<std::size_t>(spec.sliding_window),
          .padding = spec.padding ? inputs[padding].data<std::int32_t>() : nullptr};
}

std::vector<mx::array> attention_backward(const std::vector<mx::array>& inputs, const std::vector<mx::array>& outputs,
                                          const mx::array& gradient, const AttentionSpec& spec) {
  auto read = inputs;
  read.insert(read.begin() + 3, {outputs[0], outputs[1], mx::contiguous(gradient)});
  auto gradients =
      cpu_operation("CausalAttentionBackward", std::move(read),
                    {token_major_shape(inputs[0]), token_major_shape(inputs[1]), token_major_shape(inputs[2])},
                    [spec](const auto& in, auto& out) {
                      const StridedInput q(in[0]), k(in[1]), v(in[2]);
                      causal_attention_backward(shape_of(in[0], in[1]), rule_of(spec, in, 6), q.view(), k.view(), v.view(),
                                                token_major_view(in[3]), in[4].template data<float>(), token_major_view(in[5]),
                                                token_major_view(out[0]), token_major_view(out[1]), token_major_view(out[2]));
                    });
  for (auto& x : gradients) x = from_token_major(x);
  return gradients;
}

}  // namespace

mx::array causal_attention(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionSpec& spec) {
  if (!own_kernels()) return attention_graph(q, k, v, spec);
  std::vector<mx::array> inputs = {q, k, v};
  if (spec.padding) inputs.push_back(mx::contiguous(mx::astype(*spec.padding, mx::int32)));
  const auto outputs = cpu_operation(
      "CausalAttention", std::move(inputs), {token_major_shape(q), {q.shape(0), q.shape(1), q.shape(2)}},
      [spec](const auto& in, auto& out) {
        const StridedInput q(in[0]), k(in[1]), v(in[2]);
        causal_attention(shape_of(in[0], in[1]), rule_of(spec, in, 3), q.view(), k.view(), v.view(), token_major_view(out[0]),
                         out[1].template data<float>());
      },
      [spec](const auto& in, const auto& out, const auto& gradients, const auto& wanted) {
        const auto all = attention_backward(in, out, gradients[0], spec);
        std::vector<mx::array> results;
        for (const int input : wanted) results.push_back(all.at(static_cast<std::size_t>(input)));
        return results;
      });
  return from_token_major(outputs[0]);
}

mx::array FullCache::attend(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionSpec& spec) {
  const int position = offset();
  const auto queries = (*spec.rope)(q, position);
  const auto [keys, values] = store_.append((*spec.rope)(k, position), v);
  return causal_attention(queries, keys, values, spec);
}

CacheFactory FullCache::factory() {
  return [](int) { return std::make_unique<FullCache>(); };
}

}  // namespace veloxquant
