#include "veloxquant/model/attention.h"

#include "mlx/fast.h"
#include "veloxquant/kernels/attention.h"
#include "veloxquant/model/cpu_operation.h"

namespace veloxquant {

mx::array causal_attention(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionSpec& spec) {
  if (!own_kernels()) return mx::fast::scaled_dot_product_attention(q, k, v, spec.scale, "causal");
  const auto size = [](const mx::array& x, int axis) { return static_cast<std::size_t>(x.shape(axis)); };
  const AttentionShape shape{size(q, 0), size(q, 1), size(k, 1), size(q, 2), size(k, 2), size(q, 3)};
  return cpu_operation("CausalAttention", {q, k, v}, q.shape(), mx::float32,
                       [shape, scale = spec.scale](const std::vector<mx::array>& in, mx::array& out) {
                         causal_attention(shape, scale, strided(in[0]), strided(in[1]), strided(in[2]), mutable_strided(out));
                       });
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
