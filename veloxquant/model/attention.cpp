#include "veloxquant/model/attention.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <iterator>

#include "mlx/fast.h"
#include "mlx/ops.h"
#include "veloxquant/core/error.h"
#include "veloxquant/kernels/attention.h"
#include "veloxquant/model/array_entry.h"
#include "veloxquant/model/cpu_operation.h"

namespace veloxquant {

namespace {

// How far each of S keys lies behind each of T queries: int32 [1, 1, T, S], negative for later keys.
mx::array distances(int queries, int keys) {
  const auto query = mx::reshape(mx::arange(keys - queries, keys, mx::int32), {1, 1, queries, 1});
  return mx::subtract(query, mx::reshape(mx::arange(keys), {1, 1, 1, keys}));
}

// Which keys each query sees: bool [B or 1, 1, T, S].
mx::array seen_keys(const mx::array& distance, const AttentionSpec& spec) {
  auto seen = mx::greater_equal(distance, mx::array(0));
  if (spec.sliding_window > 0) seen = mx::logical_and(seen, mx::less(distance, mx::array(spec.sliding_window)));
  if (spec.padding)
    seen = mx::logical_and(seen, mx::greater_equal(mx::arange(distance.shape(-1)), mx::reshape(*spec.padding, {-1, 1, 1, 1})));
  return seen;
}

// By MLX's operations, on any device.
mx::array attention_graph(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionSpec& spec,
                          const std::optional<NearTokens>& near) {
  const bool plain = spec.sliding_window == 0 && !spec.padding && !near;
  if (spec.soft_cap == 0 && plain) return mx::fast::scaled_dot_product_attention(q, k, v, spec.scale, "causal");
  const int batch = q.shape(0), heads = q.shape(1), kv_heads = k.shape(1), queries = q.shape(2), keys = k.shape(2),
            dim = q.shape(3);
  const auto grouped = mx::reshape(q, {batch, kv_heads, heads / kv_heads, queries, dim});
  const auto products = [&](const mx::array& k) { return mx::matmul(grouped, mx::swapaxes(mx::expand_dims(k, 2), -1, -2)); };
  const auto distance = distances(queries, keys);
  const auto is_near = mx::expand_dims(mx::less(distance, mx::array(near ? near->window : 0)), 2);
  // Near keys stand where the far ones that they replace do.
  const auto at_end = [&](const mx::array& x) { return mx::pad(x, {{0, 0}, {0, 0}, {keys - x.shape(2), 0}, {0, 0}}); };
  auto scores = products(k);
  if (near) scores = mx::where(is_near, products(at_end(near->k)), scores);
  scores = mx::multiply(scores, mx::array(spec.scale));
  if (spec.soft_cap > 0) scores = mx::multiply(mx::tanh(mx::divide(scores, mx::array(spec.soft_cap))), mx::array(spec.soft_cap));
  const auto seen = mx::expand_dims(seen_keys(distance, spec), 2);
  // Finite, so that a query that sees nothing has weights, which the mask then takes away.
  const auto weights = mx::softmax(mx::where(seen, scores, mx::array(-1e30f)), -1, /* precise= */ true);
  const auto sum = [&](const mx::array& which, const mx::array& v) {
    return mx::matmul(mx::where(which, weights, mx::array(0.0f)), mx::expand_dims(v, 2));
  };
  if (!near) return mx::reshape(sum(seen, v), q.shape());
  const auto far_sum = sum(mx::logical_and(seen, mx::logical_not(is_near)), v);
  return mx::reshape(mx::add(far_sum, sum(mx::logical_and(seen, is_near), at_end(near->v))), q.shape());
}

AttentionShape shape_of(const mx::array& q, const mx::array& k) {
  const auto size = [](const mx::array& x, int axis) { return static_cast<std::size_t>(x.shape(axis)); };
  return {size(q, 0), size(q, 1), size(k, 1), size(q, 2), size(k, 2), size(q, 3)};
}

// Padding is the last of the inputs, if it is one.
AttentionRule rule_of(const AttentionSpec& spec, const std::vector<mx::array>& inputs) {
  return {.scale = spec.scale,
          .soft_cap = spec.soft_cap,
          .window = static_cast<std::size_t>(spec.sliding_window),
          .padding = spec.padding ? inputs.back().data<std::int32_t>() : nullptr};
}

// The inputs begin with q, k and v; with a window for near keys, near's k and v follow.
std::ptrdiff_t differentiable(int near_window) {
  return near_window > 0 ? 5 : 3;
}

std::vector<StridedInput> strided(const std::vector<mx::array>& inputs, int near_window) {
  return {inputs.begin(), inputs.begin() + differentiable(near_window)};
}

NearKeys near_of(const std::vector<mx::array>& inputs, const std::vector<StridedInput>& strided, int near_window) {
  if (near_window == 0) return {};
  return {static_cast<std::size_t>(near_window), static_cast<std::size_t>(inputs[3].shape(2)), strided[3].view(),
          strided[4].view()};
}

std::vector<mx::array> attention_backward(const std::vector<mx::array>& inputs, const std::vector<mx::array>& outputs,
                                          const mx::array& gradient, const AttentionSpec& spec, int near_window) {
  const auto count = differentiable(near_window);
  auto read = inputs;
  read.insert(read.begin() + count, {outputs[0], outputs[1], mx::contiguous(gradient)});
  std::vector<mx::Shape> shapes;
  std::transform(inputs.begin(), inputs.begin() + count, std::back_inserter(shapes), token_major_shape);
  auto gradients = cpu_operation(
      "CausalAttentionBackward", std::move(read), std::move(shapes), [spec, near_window, count](const auto& in, auto& out) {
        const auto x = strided(in, near_window);
        const mx::array* more = in.data() + count;
        std::vector<MutableStridedView> by(5);  // near's stay empty where there are none
        std::transform(out.begin(), out.end(), by.begin(), [](mx::array& y) { return token_major_view(y); });
        causal_attention_backward(shape_of(in[0], in[1]), rule_of(spec, in), x[0].view(), x[1].view(), x[2].view(),
                                  token_major_view(more[0]), more[1].data<float>(), token_major_view(more[2]), by[0], by[1], by[2],
                                  near_of(in, x, near_window), by[3], by[4]);
      });
  for (auto& x : gradients) x = from_token_major(x);
  return gradients;
}

void check(const NearTokens& near, const mx::array& q, const mx::array& k) {
  if (near.window < 1) throw_invalid("attention", "expected a window of at least 1 near token, got {}", near.window);
  const int keys = k.shape(2), least = std::min(keys, std::min(near.window, keys) + q.shape(2) - 1);
  for (const auto& x : {near.k, near.v})
    if (x.ndim() != 4 || x.shape(0) != k.shape(0) || x.shape(1) != k.shape(1) || x.shape(2) < least || x.shape(2) > keys ||
        x.shape(2) != near.k.shape(2) || x.shape(3) != k.shape(3))
      throw_invalid("attention", "expected near keys and values of shape [{}, {}, {} to {}, {}], got [{}]", k.shape(0), k.shape(1),
                    least, keys, k.shape(3), fmt::join(x.shape(), ", "));
}

}  // namespace

mx::array causal_attention(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionSpec& spec,
                           const std::optional<NearTokens>& near) {
  if (near) check(*near, q, k);
  if (!own_kernels()) return attention_graph(q, k, v, spec, near);
  const int near_window = near ? near->window : 0;
  std::vector<mx::array> inputs = {q, k, v};
  if (near) inputs.insert(inputs.end(), {near->k, near->v});
  if (spec.padding) inputs.push_back(mx::contiguous(mx::astype(*spec.padding, mx::int32)));
  const auto outputs = cpu_operation(
      "CausalAttention", std::move(inputs), {token_major_shape(q), {q.shape(0), q.shape(1), q.shape(2)}},
      [spec, near_window](const auto& in, auto& out) {
        const auto x = strided(in, near_window);
        causal_attention(shape_of(in[0], in[1]), rule_of(spec, in), x[0].view(), x[1].view(), x[2].view(), token_major_view(out[0]),
                         out[1].template data<float>(), near_of(in, x, near_window));
      },
      [spec, near_window](const auto& in, const auto& out, const auto& gradients, const auto& wanted) {
        const auto all = attention_backward(in, out, gradients[0], spec, near_window);
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

int FullCache::trim(int tokens) {
  const int dropped = std::clamp(tokens, 0, offset());
  store_.keep(offset() - dropped);
  return dropped;
}

std::unique_ptr<SavableCache> FullCache::clone() const {
  // Arrays do not change: another is made for tokens that are appended.
  return std::make_unique<FullCache>(*this);
}

CacheState FullCache::state() const {
  const auto held = store_.tokens();
  if (!held) return {};
  return {{"keys", on_cpu(held->first)}, {"values", on_cpu(held->second)}};
}

void FullCache::restore(const CacheState& state) {
  TokenStore restored;
  if (!state.empty()) {
    const auto keys = state.find("keys"), values = state.find("values");
    if (keys == state.end() || values == state.end() || state.size() != 2)
      throw_invalid("cache", "expected a state of keys and values, got {} arrays", state.size());
    const auto &k = keys->second, &v = values->second;
    if (k.ndim() != 4 || k.shape() != v.shape() || k.dtype() != v.dtype() || !mx::issubdtype(k.dtype(), mx::floating))
      throw_invalid("cache", "expected keys and values of one shape [B, H, T, D] and type, got [{}] and [{}]",
                    fmt::join(k.shape(), ", "), fmt::join(v.shape(), ", "));
    restored.append(k, v);
  }
  store_ = std::move(restored);
}

CacheFactory FullCache::factory() {
  return [](int) { return std::make_unique<FullCache>(); };
}

}  // namespace veloxquant
