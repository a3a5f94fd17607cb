#include "veloxquant/calibrate/observe.h"

#include <algorithm>
#include <cmath>

#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "veloxquant/calibrate/activations.h"
#include "veloxquant/core/error.h"
#include "veloxquant/model/attention.h"

namespace veloxquant {
namespace {

void check_finite(const LayerObservation& observation, int layer) {
  for (const Side side : {Side::kKeys, Side::kValues})
    for (const float value : observation.span(side))
      if (!std::isfinite(value))
        throw_failure("observe", "layer_{}: the model's {} hold {}: its weights are damaged or overflow float32", layer,
                      to_string(side), value);
}

}  // namespace

mx::array ObservingCache::attend(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionSpec& spec) {
  queries_ = (*spec.rope)(q, 0);
  keys_ = (*spec.rope)(k, 0);
  values_ = v;
  return causal_attention(*queries_, *keys_, v, spec);
}

LayerObservation join_observations(int layer, std::vector<mx::array> keys, std::vector<mx::array> values) {
  LayerObservation observation{mx::contiguous(mx::concatenate(keys, 0)), mx::contiguous(mx::concatenate(values, 0))};
  mx::eval(observation.keys, observation.values);
  check_finite(observation, layer);
  return observation;
}

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
  Activations hidden;
  for (int begin = 0; begin < samples.count; begin += step)
    hidden.add(model.embed(token_array(samples, begin, std::min(begin + step, samples.count))));
  ProgressStage stage(progress, "observing keys and values", hidden.size() * num_layers);
  for (int layer = 0; layer < num_layers; ++layer) {
    std::vector<mx::array> keys, values;
    for (std::size_t i = 0; i < hidden.size(); ++i) {
      ObservingCache cache;
      hidden.set(i, model.layer(layer, hidden.get(i), cache));
      keys.push_back(cache.keys());
      values.push_back(cache.values());
      mx::eval(keys.back(), values.back());
      stage.advance();
    }
    visit(layer, join_observations(layer, std::move(keys), std::move(values)));
  }
}

}  // namespace veloxquant
