#include "veloxquant/cache/restoring_cache.h"

#include <algorithm>
#include <numeric>

#include "mlx/ops.h"
#include "veloxquant/cache/restore_graph.h"
#include "veloxquant/core/parallel.h"
#include "veloxquant/model/attention.h"
#include "veloxquant/model/cpu_operation.h"

namespace veloxquant {
namespace {

mx::array tokens(const mx::array& x, int begin, int end) {
  return mx::slice(x, {0, 0, begin, 0}, {x.shape(0), x.shape(1), end, x.shape(3)});
}

mx::array after(const std::optional<mx::array>& before, const mx::array& x) {
  return before ? mx::concatenate({*before, x}, 2) : x;
}

// Tokens of one sequence and head that a thread restores at a time: whole groups of tokens for every quantizer.
constexpr int kGroupsPerTask = 256;

mx::array restore_on_cpu(const std::shared_ptr<const Quantizer>& quantizer, const mx::array& x) {
  return cpu_operation(
      "Restore", {mx::contiguous(x)}, {x.shape()}, [quantizer](const std::vector<mx::array>& in, std::vector<mx::array>& outputs) {
        mx::array& out = outputs[0];
        const auto dim = static_cast<std::size_t>(out.shape(3)), tokens = static_cast<std::size_t>(out.shape(2));
        const std::size_t piece =
            static_cast<std::size_t>(quantizer->token_group() * std::max(1, kGroupsPerTask / quantizer->token_group()));
        const std::size_t pieces = (tokens + piece - 1) / piece,
                          runs = static_cast<std::size_t>(out.shape(0)) * static_cast<std::size_t>(out.shape(1));
        parallel_for(runs * pieces, 1, [&](std::size_t i, std::size_t) {
          const std::size_t begin = i % pieces * piece, at = (i / pieces * tokens + begin) * dim,
                            size = std::min(piece, tokens - begin) * dim;
          quantizer->restore({in[0].data<float>() + at, size}, {out.data<float>() + at, size});
        });
      })[0];
}

}  // namespace

mx::array RestoringCache::attend(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionSpec& spec) {
  const auto queries = (*spec.rope)(q, offset_);
  const auto waiting_k = after(tail_k_, (*spec.rope)(k, offset_)), waiting_v = after(tail_v_, v);
  offset_ += k.shape(2);
  const auto restored_k = restore_keys_.apply(waiting_k), restored_v = restore_values_.apply(waiting_v);

  const int group = std::lcm(restore_keys_.token_group, restore_values_.token_group), waiting = waiting_k.shape(2);
  const int done = waiting / group * group;
  tail_k_ = tail_v_ = std::nullopt;
  if (done == waiting) {
    const auto [keys, values] = complete_.append(restored_k, restored_v);
    return causal_attention(queries, keys, values, spec);
  }
  tail_k_ = tokens(waiting_k, done, waiting);
  tail_v_ = tokens(waiting_v, done, waiting);
  const auto [keys, values] = complete_.append(tokens(restored_k, 0, done), tokens(restored_v, 0, done));
  return causal_attention(queries, mx::concatenate({keys, tokens(restored_k, done, waiting)}, 2),
                          mx::concatenate({values, tokens(restored_v, done, waiting)}, 2), spec);
}

Restore make_restore(const QuantizerParameters& parameters) {
  const std::shared_ptr<const Quantizer> quantizer = make_quantizer(parameters);
  return {[quantizer, on_gpu = restore_graph(parameters, *quantizer)](const mx::array& x) {
            return own_kernels() ? restore_on_cpu(quantizer, x) : on_gpu(x);
          },
          quantizer->token_group()};
}

CacheFactory restoring_factory(const Plan& plan) {
  std::vector<std::pair<Restore, Restore>> layers(static_cast<std::size_t>(plan.model.num_layers));
  for (const auto& unit : plan.units) {
    auto& [keys, values] = layers.at(static_cast<std::size_t>(unit.layer));
    (unit.side == Side::kKeys ? keys : values) = make_restore(unit.quantizer);
  }
  return [layers = std::move(layers)](int layer) {
    const auto& [keys, values] = layers.at(static_cast<std::size_t>(layer));
    return std::make_unique<RestoringCache>(keys, values);
  };
}

}  // namespace veloxquant
