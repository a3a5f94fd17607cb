#include "veloxquant/cache/restoring_cache.h"

#include <algorithm>
#include <numeric>

#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "veloxquant/cache/restore_graph.h"
#include "veloxquant/core/parallel.h"
#include "veloxquant/model/attention.h"
#include "veloxquant/model/cpu_operation.h"

namespace veloxquant {
namespace {

mx::array tokens(const mx::array& x, int begin, int end) {
  return mx::slice(x, {0, 0, begin, 0}, {x.shape(0), x.shape(1), end, x.shape(3)});
}

// Tokens of one sequence and head that a thread restores at a time: whole groups of tokens for every quantizer.
constexpr int kGroupsPerTask = 256;

// One for all heads, or one for each; none: what it would store stays as it is.
using Quantizers = std::vector<std::shared_ptr<const Quantizer>>;

mx::array restore_on_cpu(const Quantizers& quantizers, int group, const mx::array& x) {
  return cpu_operation("Restore", {mx::contiguous(x)}, {x.shape()},
                       [quantizers, group](const std::vector<mx::array>& in, std::vector<mx::array>& outputs) {
                         mx::array& out = outputs[0];
                         const auto dim = static_cast<std::size_t>(out.shape(3)), tokens = static_cast<std::size_t>(out.shape(2)),
                                    heads = static_cast<std::size_t>(out.shape(1));
                         const auto piece = static_cast<std::size_t>(group * std::max(1, kGroupsPerTask / group));
                         const std::size_t pieces = (tokens + piece - 1) / piece,
                                           runs = static_cast<std::size_t>(out.shape(0)) * heads;
                         parallel_for(runs * pieces, 1, [&](std::size_t i, std::size_t) {
                           const std::size_t run = i / pieces, begin = i % pieces * piece, at = (run * tokens + begin) * dim,
                                             size = std::min(piece, tokens - begin) * dim;
                           const auto& quantizer = quantizers[quantizers.size() == 1 ? 0 : run % heads];
                           const float* from = in[0].data<float>() + at;
                           float* to = out.data<float>() + at;
                           if (quantizer) {
                             quantizer->restore({from, size}, {to, size});
                           } else {
                             std::copy_n(from, size, to);
                           }
                         });
                       })[0];
}

mx::array head_of(const mx::array& x, int head) {
  return mx::slice(x, {0, head, 0, 0}, {x.shape(0), head + 1, x.shape(2), x.shape(3)});
}

mx::array restore_by_graphs(const std::vector<RestoreGraph>& graphs, const mx::array& x) {
  if (graphs.size() == 1) return graphs[0](x);
  std::vector<mx::array> heads;
  for (std::size_t head = 0; head < graphs.size(); ++head) {
    heads.push_back(graphs[head](head_of(x, static_cast<int>(head))));
    // Heads on their own are graphs of few kinds, which CUDA's back end keeps; in layers as wholes hardly two would be alike.
    if (!x.is_tracer()) mx::async_eval(heads.back());
  }
  return mx::concatenate(heads, 1);
}

}  // namespace

RestoringCache::RestoringCache(Restore keys, Restore values, ExactTokens exact)
    : restore_keys_(std::move(keys)), restore_values_(std::move(values)), exact_(exact) {}

RestoringCache::KeysValues RestoringCache::exactly(const KeysValues& x) {
  if (!exact_.eight_bits) return x;
  if (!exact_keys_) {
    exact_keys_ = make_restore(exact_parameters(Side::kKeys, x.k.shape(3)));
    exact_values_ = make_restore(exact_parameters(Side::kValues, x.v.shape(3)));
  }
  return {exact_keys_->apply(x.k), exact_values_->apply(x.v)};
}

// Tokens that queries of this call may see in their window, keys after RoPE.
std::optional<NearTokens> RestoringCache::remember(KeysValues near) {
  if (exact_.window == 0) return std::nullopt;
  if (recent_) near = {mx::concatenate({recent_->k, near.k}, 2), mx::concatenate({recent_->v, near.v}, 2)};
  const int held = near.k.shape(2), kept = std::min(held, exact_.window - 1);
  recent_ = std::nullopt;
  if (kept > 0) recent_ = KeysValues{tokens(near.k, held - kept, held), tokens(near.v, held - kept, held)};
  return NearTokens{exact_.window, near.k, near.v};
}

mx::array RestoringCache::attend(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionSpec& spec) {
  const Rope& rope = *spec.rope;
  const bool before_rope = restore_keys_.before_rope;
  const auto turned = [&](const mx::array& keys, int first) { return before_rope ? rope(keys, first) : keys; };
  const int count = k.shape(2), first = offset_, sinks = std::clamp(exact_.sinks - first, 0, count);
  offset_ += count;
  const auto queries = rope(q, first);
  KeysValues arrived{before_rope ? k : rope(k, first), v};
  // What leaves the window is coded from what the window held.
  if (exact_.window > 0) arrived = exactly(arrived);
  const auto near = remember({turned(arrived.k, first), arrived.v});
  if (sinks > 0) {
    KeysValues kept{tokens(arrived.k, 0, sinks), tokens(arrived.v, 0, sinks)};
    if (exact_.window == 0) kept = exactly(kept);
    const auto all = stored_.append(turned(kept.k, first), kept.v);
    if (sinks == count) return causal_attention(queries, all.first, all.second, spec, near);
  }
  KeysValues waiting{tokens(arrived.k, sinks, count), tokens(arrived.v, sinks, count)};
  if (tail_) waiting = {mx::concatenate({tail_->k, waiting.k}, 2), mx::concatenate({tail_->v, waiting.v}, 2)};
  tail_ = std::nullopt;
  const KeysValues restored{turned(restore_keys_.apply(waiting.k), stored_.size()), restore_values_.apply(waiting.v)};

  const int group = std::lcm(restore_keys_.token_group, restore_values_.token_group), held = waiting.k.shape(2),
            done = held / group * group;
  const auto part = [&](const KeysValues& x, int begin, int end) {
    return KeysValues{tokens(x.k, begin, end), tokens(x.v, begin, end)};
  };
  const auto complete = part(restored, 0, done);
  const auto [keys, values] = stored_.append(complete.k, complete.v);
  if (done == held) return causal_attention(queries, keys, values, spec, near);
  tail_ = part(waiting, done, held);
  const auto rest = part(restored, done, held);
  return causal_attention(queries, mx::concatenate({keys, rest.k}, 2), mx::concatenate({values, rest.v}, 2), spec, near);
}

Restore make_restore(const QuantizerParameters& parameters) {
  return make_restore(std::vector{std::optional(parameters)});
}

Restore make_restore(const std::vector<std::optional<QuantizerParameters>>& heads) {
  Quantizers quantizers;
  std::vector<RestoreGraph> graphs;
  int group = 1;
  bool before_rope = false;
  for (const auto& parameters : heads) {
    quantizers.push_back(parameters ? make_quantizer(*parameters) : nullptr);
    graphs.push_back(parameters ? restore_graph(*parameters, quantizers.back()) : [](const mx::array& x) { return x; });
    if (!parameters) continue;
    group = std::lcm(group, quantizers.back()->token_group());
    before_rope = parameters->side == Side::kKeys && quantizer_method(parameters->method).keys_before_rope;
  }
  return {[=](const mx::array& x) { return own_kernels() ? restore_on_cpu(quantizers, group, x) : restore_by_graphs(graphs, x); },
          group, before_rope};
}

CacheFactory restoring_factory(const Plan& plan) {
  struct Layer {
    std::vector<std::optional<QuantizerParameters>> keys, values;
  };
  std::vector<Layer> units(static_cast<std::size_t>(plan.model.num_layers));
  for (const auto& unit : plan.units) {
    auto& [keys, values] = units.at(static_cast<std::size_t>(unit.layer));
    (unit.side == Side::kKeys ? keys : values).push_back(unit.quantizer);
  }
  std::vector<std::optional<std::pair<Restore, Restore>>> layers;  // none: the layer slides
  for (const auto& [keys, values] : units)
    layers.push_back(keys.empty() ? std::nullopt : std::optional(std::pair(make_restore(keys), make_restore(values))));
  return [layers = std::move(layers), exact = ExactTokens{plan.window, plan.sinks}](int layer) -> std::unique_ptr<AttentionCache> {
    const auto& stored = layers.at(static_cast<std::size_t>(layer));
    if (!stored) return std::make_unique<FullCache>();
    return std::make_unique<RestoringCache>(stored->first, stored->second, exact);
  };
}

}  // namespace veloxquant
