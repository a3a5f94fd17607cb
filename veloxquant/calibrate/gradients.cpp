#include "veloxquant/calibrate/gradients.h"

#include <algorithm>

#include "mlx/ops.h"
#include "mlx/random.h"
#include "mlx/transforms.h"
#include "veloxquant/model/attention.h"
#include "veloxquant/model/sampling.h"
#include "veloxquant/model/tap.h"

namespace veloxquant {
namespace {

// Attends at full precision; gradients by keys (before RoPE) and values are also those of two probes.
class TappedCache : public AttentionCache {
 public:
  TappedCache(mx::array keys_probe, mx::array values_probe)
      : keys_probe_(std::move(keys_probe)), values_probe_(std::move(values_probe)) {}

  mx::array attend(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionSpec& spec) override {
    offset_ = k.shape(2);
    return causal_attention((*spec.rope)(q, 0), (*spec.rope)(tap(k, keys_probe_), 0), tap(v, values_probe_), spec);
  }
  int offset() const override { return offset_; }
  std::size_t nbytes() const override { return 0; }

 private:
  mx::array keys_probe_, values_probe_;
  int offset_ = 0;
};

// What Σ_t log p(y_t) gains by hidden states [B, T, hidden_size] after the last layer.
mx::array head_gradient(const Model& model, const mx::array& hidden, std::uint64_t seed) {
  const int width = hidden.shape(-1), rows = hidden.shape(0) * hidden.shape(1);
  const auto flat = mx::reshape(hidden, {rows, width});
  const auto uniforms = mx::random::uniform({rows}, mx::float32, mx::random::key(seed));
  std::vector<mx::array> gradients;
  for (int begin = 0; begin < rows; begin += model.logit_rows()) {
    const int end = std::min(begin + model.logit_rows(), rows);
    const auto some = mx::slice(flat, {begin, 0}, {end, width});
    const auto score = sampled_score(model.logits(some), mx::slice(uniforms, {begin}, {end}));
    gradients.push_back(model.hidden_gradient(some, score));
    mx::eval(gradients.back());
  }
  return mx::reshape(mx::concatenate(gradients, 0), hidden.shape());
}

}  // namespace

std::vector<LayerGradients> likelihood_gradients(const Model& model, const mx::array& tokens, std::uint64_t seed) {
  const ModelConfig& config = model.config();
  const mx::array probe =
      mx::broadcast_to(mx::array(0.0f), {tokens.shape(0), config.num_kv_heads, tokens.shape(1), config.head_dim});
  const std::vector<mx::array> probes(2 * static_cast<std::size_t>(config.num_layers), probe);

  const auto likelihood = [&](const std::vector<mx::array>& taps) {
    AttentionCaches caches;
    for (std::size_t i = 0; i < taps.size(); i += 2) caches.push_back(std::make_unique<TappedCache>(taps[i], taps[i + 1]));
    const auto hidden = model.forward(tokens, caches);
    mx::eval(hidden);
    // Outside the graph that is differentiated, so that chunks of logits come and go.
    const auto outside = mx::array::unsafe_weak_copy(hidden);
    outside.set_status(mx::array::Status::available);
    const auto gradient = head_gradient(model, outside, seed);
    return std::vector<mx::array>{mx::sum(mx::multiply(hidden, gradient))};
  };
  const auto gradients = mx::vjp(likelihood, probes, {mx::array(1.0f)}).second;
  mx::eval(gradients);
  std::vector<LayerGradients> layers;
  for (std::size_t i = 0; i < gradients.size(); i += 2) layers.push_back({gradients[i], gradients[i + 1]});
  return layers;
}

}  // namespace veloxquant
