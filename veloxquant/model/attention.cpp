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

mx::array tokens(const mx::array& x, int begin, int end) {
  return mx::slice(x, {0, 0, begin, 0}, {x.shape(0), x.shape(1), end, x.shape(3)});
}

// Which of the keys at `key` [n] the queries at `query` [c, 1] see, those of a sequence that are padding aside: bool [c, n].
// Near ones are the last near_window, where that is above 0; far ones those before.
mx::array seen_keys(const mx::array& query, const mx::array& key, bool near, int near_window, int sliding_window) {
  const auto distance = mx::subtract(query, key);
  auto seen = mx::greater_equal(distance, mx::array(near ? 0 : near_window));
  const auto within = [&](int window) { seen = mx::logical_and(seen, mx::less(distance, mx::array(window))); };
  if (near) within(near_window);
  if (sliding_window > 0) within(sliding_window);
  return seen;
}

// By MLX's operations, on any device: queries that stand at the positions from `begin` to `end` of the keys, which exist up to
// there.
mx::array attend_queries(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionSpec& spec,
                         const std::optional<NearTokens>& near, int begin, int end) {
  const int sliding = spec.sliding_window, first = sliding > 0 ? std::max(0, begin - sliding + 1) : 0;
  if (spec.soft_cap == 0 && sliding == 0 && !spec.padding && !near)
    return mx::fast::scaled_dot_product_attention(q, tokens(k, 0, end), tokens(v, 0, end), spec.scale, "causal");
  const int window = near ? near->window : 0, first_near = near ? std::max(first, begin - window + 1) : end,
            last_far = std::max(first, end - window);
  const auto query = mx::reshape(mx::arange(begin, end, mx::int32), {-1, 1});
  std::vector<mx::array> all_keys, all_values, all_positions, all_seen;
  // The keys from `from` to `to`, which in k and v stand `before` earlier.
  const auto add = [&](const mx::array& k, const mx::array& v, int from, int to, int before, bool is_near) {
    if (from == to) return;
    all_keys.push_back(tokens(k, from - before, to - before));
    all_values.push_back(tokens(v, from - before, to - before));
    all_positions.push_back(mx::arange(from, to, mx::int32));
    all_seen.push_back(seen_keys(query, all_positions.back(), is_near, window, sliding));
  };
  add(k, v, first, last_far, 0, false);
  if (near) add(near->k, near->v, first_near, end, k.shape(2) - near->k.shape(2), true);
  const auto joined = [](const std::vector<mx::array>& parts, int axis) {
    return parts.size() == 1 ? parts[0] : mx::concatenate(parts, axis);
  };
  const auto keys = joined(all_keys, 2), values = joined(all_values, 2);
  auto seen = joined(all_seen, 1);
  if (spec.padding) {
    const auto padding = mx::reshape(*spec.padding, {-1, 1, 1, 1, 1});
    seen = mx::logical_and(seen, mx::greater_equal(joined(all_positions, 0), padding));
  }

  const int batch = q.shape(0), heads = q.shape(1), kv_heads = k.shape(1), group = heads / kv_heads, queries = end - begin;
  const mx::Shape rows = {batch, kv_heads, group * queries, -1}, by_head = {batch, kv_heads, group, queries, -1};
  const auto scaled = mx::reshape(mx::multiply(q, mx::array(spec.scale)), rows);
  auto scores = mx::reshape(mx::matmul(scaled, mx::swapaxes(keys, -1, -2)), by_head);
  if (spec.soft_cap > 0) scores = mx::multiply(mx::tanh(mx::divide(scores, mx::array(spec.soft_cap))), mx::array(spec.soft_cap));
  // Finite, so that a query that sees nothing, padding, has weights, which are then taken away.
  auto weights = mx::softmax(mx::where(seen, scores, mx::array(-1e30f)), -1, /* precise= */ true);
  if (spec.padding) weights = mx::where(seen, weights, mx::array(0.0f));
  return mx::reshape(mx::matmul(mx::reshape(weights, rows), values), q.shape());
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

mx::array causal_attention_graph(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionSpec& spec,
                                 const std::optional<NearTokens>& near, std::int64_t scores_at_once) {
  const int queries = q.shape(2), keys = k.shape(2), first = keys - queries;
  const std::int64_t scores = static_cast<std::int64_t>(q.shape(0)) * q.shape(1) * keys;
  const int step = static_cast<int>(std::clamp<std::int64_t>(scores_at_once / scores, 1, queries));
  std::vector<mx::array> parts;
  for (int begin = 0; begin < queries; begin += step) {
    const int end = std::min(begin + step, queries);
    auto some = tokens(q, begin, end);
    // One after another: MLX would compute the scores of all parts before it uses those of the first.
    if (!parts.empty()) some = mx::depends({some}, {parts.back()})[0];
    parts.push_back(attend_queries(some, k, v, spec, near, first + begin, first + end));
  }
  return parts.size() == 1 ? parts[0] : mx::concatenate(parts, 2);
}

mx::array causal_attention(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionSpec& spec,
                           const std::optional<NearTokens>& near) {
  if (near) check(*near, q, k);
  if (!own_kernels()) return causal_attention_graph(q, k, v, spec, near);
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
