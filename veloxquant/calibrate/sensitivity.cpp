#include "veloxquant/calibrate/sensitivity.h"

#include <algorithm>
#include <cmath>

#include "veloxquant/calibrate/activations.h"
#include "veloxquant/calibrate/observe.h"
#include "veloxquant/core/error.h"
#include "veloxquant/core/random.h"
#include "veloxquant/model/attention.h"
#include "veloxquant/model/divergence.h"
#include "veloxquant/model/noise.h"
#include "veloxquant/quantize/distortion.h"

namespace veloxquant {
namespace {

struct Deviations {
  float keys, values;
};

// Attends to keys (after RoPE) and values with Gaussian noise on them.
class PerturbingCache : public AttentionCache {
 public:
  PerturbingCache(Deviations noise, std::uint64_t seed, int layer, int step)
      : noise_(noise),
        keys_seed_(noise_seed(seed, layer, step, Side::kKeys)),
        values_seed_(noise_seed(seed, layer, step, Side::kValues)) {}

  mx::array attend(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionSpec& spec) override {
    offset_ = k.shape(2);
    return causal_attention((*spec.rope)(q, 0), add_gaussian_noise((*spec.rope)(k, 0), noise_.keys, keys_seed_),
                            add_gaussian_noise(v, noise_.values, values_seed_), spec);
  }
  int offset() const override { return offset_; }
  std::size_t nbytes() const override { return 0; }

 private:
  Deviations noise_;
  std::uint64_t keys_seed_, values_seed_;
  int offset_ = 0;
};

double standard_deviation(std::span<const float> x) {
  double sum = 0, squares = 0;
  for (const double value : x) sum += value, squares += value * value;
  const double mean = sum / static_cast<double>(x.size());
  return std::sqrt(std::max(0.0, squares / static_cast<double>(x.size()) - mean * mean));
}

float noise_deviation(double noise_scale, const LayerObservation& observation, Side side, int layer) {
  const auto deviation = static_cast<float>(noise_scale * standard_deviation(observation.span(side)));
  if (!std::isfinite(deviation))
    throw_invalid("sensitivity", "noise_scale: {} times the deviation of the {} of {} overflows float32", noise_scale,
                  to_string(side), layer_name(layer));
  return deviation;
}

void check_change(std::size_t layer, double change) {
  if (!std::isfinite(change))
    throw_failure("sensitivity", "{}: expected a finite change of the output, got {}: its noise makes float32 overflow",
                  layer_name(static_cast<int>(layer)), change);
}

// Hidden states of all samples, a few samples together: stream 0 is the clean one, stream s + 1 has noise in layer s.
class Streams {
 public:
  Streams(const LanguageModel& model, const TokenBatch& samples) : model_(model), samples_(samples), hidden_(kHiddenBytes) {
    const int step = samples_per_step(samples);
    for (int begin = 0; begin < samples.count; begin += step, ++steps_)
      hidden_.add(model.embed(token_array(samples, begin, std::min(begin + step, samples.count))));
  }

  // Runs of a layer over the samples of one step that run_layer() makes for all layers.
  std::size_t total_runs() const {
    const auto layers = static_cast<std::size_t>(model_.config().num_layers);
    return steps_ * layers * (layers + 3) / 2;
  }

  // `measure` sees the layer's keys and values before noise is put into it, and says how much.
  void run_layer(int layer, std::uint64_t seed, const std::function<Deviations(const LayerObservation&)>& measure,
                 ProgressStage& stage) {
    LayerObservation observation(layer, observed_elements(model_, samples_));
    Activations clean(kHiddenBytes / 4);
    for (std::size_t i = 0; i < steps_; ++i) {
      ObservingCache cache;
      clean.add(model_.layer(layer, hidden_.get(i), cache));
      observation.add(cache);
      stage.advance();
    }
    const Deviations noise = measure(observation);
    for (std::size_t stream = 1; stream <= static_cast<std::size_t>(layer); ++stream) {
      for (std::size_t i = stream * steps_; i < (stream + 1) * steps_; ++i) {
        FullCache cache;
        hidden_.set(i, model_.layer(layer, hidden_.get(i), cache));
        stage.advance();
      }
    }
    for (std::size_t i = 0; i < steps_; ++i) {
      PerturbingCache cache(noise, seed, layer, static_cast<int>(i));
      hidden_.add(model_.layer(layer, hidden_.get(i), cache));
      hidden_.set(i, clean.get(i));
      stage.advance();
    }
  }

  // The output changes of all samples for noise in each layer.
  std::vector<std::vector<double>> output_changes(const ProgressCallback& progress) const {
    std::vector<std::vector<double>> changes(hidden_.size() / steps_ - 1);
    ProgressStage stage(progress, "measuring output changes", steps_);
    for (std::size_t i = 0; i < steps_; ++i) {
      const int count = std::min(samples_per_step(samples_), samples_.count - static_cast<int>(i) * samples_per_step(samples_));
      for (int sample = 0; sample < count; ++sample) add_changes(i, sample, changes);
      stage.advance();
    }
    return changes;
  }

 private:
  void add_changes(std::size_t step, int sample, std::vector<std::vector<double>>& changes) const {
    std::vector<mx::array> hidden;
    for (std::size_t at = step; at < hidden_.size(); at += steps_) hidden.push_back(hidden_.get_row(at, sample));
    const auto scores = score_hidden(model_, hidden, {});
    for (std::size_t layer = 0; layer < changes.size(); ++layer) {
      double sum = 0;
      for (const auto& position : scores[layer + 1]) sum += position.kl;
      check_change(layer, sum);
      changes[layer].push_back(std::sqrt(2 * sum / static_cast<double>(scores[layer + 1].size())));
    }
  }

  // In memory; the rest lies in a file.
  static constexpr std::size_t kHiddenBytes = std::size_t{512} << 20;

  const LanguageModel& model_;
  const TokenBatch& samples_;
  std::size_t steps_ = 0;
  Activations hidden_;  // [stream, step]
};

void fill_statistics(SensitivityResult& result, const std::vector<double>& changes, double noise_scale) {
  const auto n = static_cast<double>(changes.size());
  double mean = 0, variance = 0;
  for (const double change : changes) mean += change / n;
  for (const double change : changes) variance += (change - mean) * (change - mean) / n;
  result.mean_sensitivity = mean / noise_scale;
  result.std_sensitivity = std::sqrt(variance) / noise_scale;
}

}  // namespace

std::uint64_t noise_seed(std::uint64_t seed, int layer, int step, Side side) {
  const auto stream = (static_cast<std::uint64_t>(layer) << 32) + static_cast<std::uint64_t>(step);
  return Random(Random(seed, stream).next(), side == Side::kKeys ? 0 : 1).next();
}

std::map<std::string, std::vector<DistortionPoint>> measure_distortions(std::span<const float> keys, std::span<const float> values,
                                                                        int head_dim, int length, const ProbeOptions& options) {
  std::map<std::string, std::vector<DistortionPoint>> distortions;
  for (const auto& name : options.quantizers) {
    const auto measure = [&](Side side, std::span<const float> vectors) {
      return relative_distortions(quantizer_method(name), side, vectors, static_cast<std::size_t>(length), head_dim, options.rates,
                                  options.seed);
    };
    const auto of_keys = measure(Side::kKeys, keys), of_values = measure(Side::kValues, values);
    for (std::size_t i = 0; i < options.rates.size(); ++i)
      distortions[name].push_back({options.rates[i], of_keys[i], of_values[i]});
  }
  return distortions;
}

LayerMap<SensitivityResult> probe_sensitivities(const LanguageModel& model, const TokenBatch& samples, const ProbeOptions& options,
                                                const ProgressCallback& progress) {
  if (!(options.noise_scale > 0) || !std::isfinite(options.noise_scale))
    throw_invalid("sensitivity", "noise_scale: expected a number above 0, got {}", options.noise_scale);
  const ModelConfig& config = model.config();

  LayerMap<SensitivityResult> results;
  Streams streams(model, samples);
  ProgressStage stage(progress, "perturbing layers", streams.total_runs());
  for (int layer = 0; layer < config.num_layers; ++layer) {
    auto& result = results[layer_name(layer)];
    result.layer_name = layer_name(layer);
    const auto measure = [&](const LayerObservation& observation) {
      result.distortions = measure_distortions(observation.span(Side::kKeys), observation.span(Side::kValues), config.head_dim,
                                               samples.length, options);
      const auto deviation = [&](Side side) { return noise_deviation(options.noise_scale, observation, side, layer); };
      return Deviations{deviation(Side::kKeys), deviation(Side::kValues)};
    };
    streams.run_layer(layer, options.seed, measure, stage);
  }
  const auto changes = streams.output_changes(progress);
  for (int layer = 0; layer < config.num_layers; ++layer)
    fill_statistics(results[layer_name(layer)], changes[static_cast<std::size_t>(layer)], options.noise_scale);
  return results;
}

}  // namespace veloxquant
