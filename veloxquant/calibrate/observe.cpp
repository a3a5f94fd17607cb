#include "veloxquant/calibrate/observe.h"

#include <algorithm>
#include <cmath>

#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "veloxquant/calibrate/activations.h"
#include "veloxquant/core/error.h"
#include "veloxquant/model/attention.h"

namespace veloxquant {

mx::array ObservingCache::attend(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionSpec& spec) {
  keys_ = (*spec.rope)(k, 0);
  values_ = v;
  return causal_attention((*spec.rope)(q, 0), *keys_, v, spec);
}

LayerObservation::LayerObservation(int layer, std::size_t values_of_a_side) : layer_(layer) {
  keys_.reserve(values_of_a_side);
  values_.reserve(values_of_a_side);
}

void LayerObservation::add(const ObservingCache& cache) {
  const auto append = [this](const mx::array& x, Side side, std::vector<float>& to) {
    const auto row_major = mx::contiguous(x);
    mx::eval(row_major);
    const std::span<const float> values(row_major.data<float>(), row_major.size());
    for (const float value : values)
      if (!std::isfinite(value))
        throw_failure("observe", "layer_{}: the model's {} hold {}: its weights are damaged or overflow float32", layer_,
                      to_string(side), value);
    to.insert(to.end(), values.begin(), values.end());
  };
  append(cache.keys(), Side::kKeys, keys_);
  append(cache.values(), Side::kValues, values_);
}

std::size_t observed_elements(const LanguageModel& model, const TokenBatch& samples) {
  return samples.tokens.size() * static_cast<std::size_t>(model.config().num_kv_heads) *
         static_cast<std::size_t>(model.config().head_dim);
}

mx::array token_array(const TokenBatch& samples, int begin, int end) {
  return mx::array(samples.row(begin).data(), {end - begin, samples.length}, mx::int32);
}

int samples_per_step(const TokenBatch& samples) {
  return std::clamp(4096 / samples.length, 1, samples.count);
}

void observe_layers(const LanguageModel& model, const TokenBatch& samples,
                    const std::function<void(int, const LayerObservation&)>& visit, const ProgressCallback& progress) {
  const int step = samples_per_step(samples), num_layers = model.config().num_layers;
  Activations hidden;
  for (int begin = 0; begin < samples.count; begin += step)
    hidden.add(model.embed(token_array(samples, begin, std::min(begin + step, samples.count))));
  ProgressStage stage(progress, "observing keys and values", hidden.size() * num_layers);
  for (int layer = 0; layer < num_layers; ++layer) {
    LayerObservation observation(layer, observed_elements(model, samples));
    for (std::size_t i = 0; i < hidden.size(); ++i) {
      ObservingCache cache;
      hidden.set(i, model.layer(layer, hidden.get(i), cache));
      observation.add(cache);
      stage.advance();
    }
    visit(layer, observation);
  }
}

}  // namespace veloxquant
