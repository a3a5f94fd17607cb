#include "veloxquant/calibrate/observe.h"

#include <algorithm>
#include <cmath>

#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "veloxquant/core/error.h"
#include "veloxquant/model/attention.h"

namespace veloxquant {
namespace {

// Attends at full precision and keeps what it was given.
class ObservingCache : public AttentionCache {
 public:
  mx::array attend(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionSpec& spec) override {
    keys_ = (*spec.rope)(k, 0);
    values_ = v;
    return causal_attention((*spec.rope)(q, 0), *keys_, v, spec);
  }
  int offset() const override { return keys_ ? keys_->shape(2) : 0; }
  std::size_t nbytes() const override { return keys_ ? keys_->nbytes() + values_->nbytes() : 0; }

  const mx::array& keys() const { return *keys_; }
  const mx::array& values() const { return *values_; }

 private:
  std::optional<mx::array> keys_, values_;
};

void check_finite(const LayerObservation& observation, int layer) {
  for (const Side side : {Side::kKeys, Side::kValues})
    for (const float value : observation.span(side))
      if (!std::isfinite(value))
        throw_failure("observe", "layer_{}: the model's {} hold {}: its weights are damaged or overflow float32", layer,
                      to_string(side), value);
}

}  // namespace

std::span<const float> LayerObservation::span(Side side) const {
  const mx::array& x = side == Side::kKeys ? keys : values;
  return {x.data<float>(), x.size()};
}

mx::array token_array(const TokenBatch& samples, int begin, int end) {
  return mx::array(samples.row(begin).data(), {end - begin, samples.length}, mx::int32);
}

int samples_per_step(const TokenBatch& samples) {
  return std::clamp(4096 / samples.length, 1, samples.count);
}

void observe_layers(const Model& model, const TokenBatch& samples, const std::function<void(int, const LayerObservation&)>& visit,
                    const ProgressCallback& progress) {
  const int step = samples_per_step(samples), num_layers = model.config().num_layers;
  std::vector<mx::array> hidden;
  for (int begin = 0; begin < samples.count; begin += step)
    hidden.push_back(model.embed(token_array(samples, begin, std::min(begin + step, samples.count))));
  ProgressStage stage(progress, "observing keys and values", hidden.size() * num_layers);
  for (int layer = 0; layer < num_layers; ++layer) {
    std::vector<mx::array> keys, values;
    for (auto& x : hidden) {
      ObservingCache cache;
      x = model.layer(layer, x, cache);
      keys.push_back(cache.keys());
      values.push_back(cache.values());
      mx::eval(x, keys.back(), values.back());
      stage.advance();
    }
    LayerObservation observation{mx::contiguous(mx::concatenate(keys, 0)), mx::contiguous(mx::concatenate(values, 0))};
    mx::eval(observation.keys, observation.values);
    check_finite(observation, layer);
    visit(layer, observation);
  }
}

}  // namespace veloxquant
