#include "veloxquant/calibrate/sensitivity.h"

#include <algorithm>
#include <cmath>

#include "mlx/ops.h"
#include "mlx/random.h"
#include "mlx/transforms.h"
#include "veloxquant/calibrate/observe.h"
#include "veloxquant/core/error.h"
#include "veloxquant/core/random.h"
#include "veloxquant/model/attention.h"
#include "veloxquant/model/divergence.h"
#include "veloxquant/quantize/distortion.h"

namespace veloxquant {
namespace {

// Bytes of hidden states that the probe of one group of samples may hold.
constexpr double kActivationBytes = 1e9;

struct Deviations {
  float keys, values;
};

// Attends to keys (after RoPE) and values with Gaussian noise on them.
class PerturbingCache : public AttentionCache {
 public:
  PerturbingCache(Deviations noise, std::uint64_t seed) : noise_(noise), keys_(mx::random::split(mx::random::key(seed), 2)) {}

  mx::array attend(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionSpec& spec) override {
    offset_ = k.shape(2);
    const auto perturbed = [&](const mx::array& x, float deviation, int row) {
      const auto key = mx::reshape(mx::slice(keys_, {row, 0}, {row + 1, 2}), {2});
      return mx::add(x, mx::multiply(mx::array(deviation), mx::random::normal(x.shape(), mx::float32, key)));
    };
    return causal_attention((*spec.rope)(q, 0), perturbed((*spec.rope)(k, 0), noise_.keys, 0), perturbed(v, noise_.values, 1),
                            spec);
  }
  int offset() const override { return offset_; }
  std::size_t nbytes() const override { return 0; }

 private:
  Deviations noise_;
  mx::array keys_;
  int offset_ = 0;
};

double standard_deviation(std::span<const float> x) {
  double sum = 0, squares = 0;
  for (const double value : x) sum += value, squares += value * value;
  const double mean = sum / static_cast<double>(x.size());
  return std::sqrt(std::max(0.0, squares / static_cast<double>(x.size()) - mean * mean));
}

// The distortions of every quantizer at every rate on what one layer stores.
std::map<std::string, std::vector<DistortionPoint>> measure_distortions(const LayerObservation& observation, int head_dim,
                                                                        int length, const ProbeOptions& options) {
  std::map<std::string, std::vector<DistortionPoint>> distortions;
  for (const auto& name : options.quantizers) {
    for (const double rate : options.rates) {
      const auto measure = [&](Side side) {
        return relative_distortion(quantizer_method(name), side, observation.span(side), static_cast<std::size_t>(length), head_dim,
                                   rate, options.seed);
      };
      distortions[name].push_back({rate, measure(Side::kKeys), measure(Side::kValues)});
    }
  }
  return distortions;
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

// One group of samples: stream 0 is the clean one, stream s + 1 has noise in layer s.
class GroupProbe {
 public:
  GroupProbe(const Model& model, const TokenBatch& samples, int begin, int end) : model_(model), begin_(begin), end_(end) {
    const int step = samples_per_step(samples);
    for (int row = begin; row < end; row += step)
      steps_.push_back({row, {model.embed(token_array(samples, row, std::min(row + step, end)))}});
  }

  void run_layer(int layer, Deviations noise, std::uint64_t seed, ProgressStage& stage) {
    for (auto& [row, streams] : steps_) {
      PerturbingCache perturbing(noise,
                                 Random(seed, (static_cast<std::uint64_t>(layer) << 32) + static_cast<std::uint64_t>(row)).next());
      auto perturbed = model_.layer(layer, streams[0], perturbing);
      for (auto& stream : streams) {
        FullCache full;
        stream = model_.layer(layer, stream, full);
        mx::eval(stream);
        stage.advance();
      }
      streams.push_back(std::move(perturbed));
      mx::eval(streams.back());
      stage.advance();
    }
  }

  // Appends to changes[layer] the output change of every sample of the group.
  void measure(std::vector<std::vector<double>>& changes) const {
    for (const auto& [row, streams] : steps_) {
      for (int sample = 0; sample < streams[0].shape(0); ++sample) {
        std::vector<mx::array> hidden;
        for (const auto& stream : streams)
          hidden.push_back(mx::slice(stream, {sample, 0, 0}, {sample + 1, stream.shape(1), stream.shape(2)}));
        const auto scores = score_hidden(model_, hidden, {});
        for (std::size_t layer = 0; layer + 1 < streams.size(); ++layer) {
          double sum = 0;
          for (const auto& position : scores[layer + 1]) sum += position.kl;
          check_change(layer, sum);
          changes[layer].push_back(std::sqrt(2 * sum / static_cast<double>(scores[layer + 1].size())));
        }
      }
    }
  }

  std::size_t num_steps() const { return steps_.size(); }

 private:
  struct Step {
    int first_row;
    std::vector<mx::array> streams;
  };

  const Model& model_;
  int begin_, end_;
  std::vector<Step> steps_;
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

LayerMap<SensitivityResult> probe_sensitivities(const Model& model, const TokenBatch& samples, const ProbeOptions& options,
                                                const ProgressCallback& progress) {
  if (!(options.noise_scale > 0) || !std::isfinite(options.noise_scale))
    throw_invalid("sensitivity", "noise_scale: expected a number above 0, got {}", options.noise_scale);
  const ModelConfig& config = model.config();

  LayerMap<SensitivityResult> results;
  std::vector<Deviations> noise;
  observe_layers(
      model, samples,
      [&](int layer, const LayerObservation& observation) {
        const auto deviation = [&](Side side) { return noise_deviation(options.noise_scale, observation, side, layer); };
        noise.push_back({deviation(Side::kKeys), deviation(Side::kValues)});
        auto& result = results[layer_name(layer)];
        result.layer_name = layer_name(layer);
        result.distortions = measure_distortions(observation, config.head_dim, samples.length, options);
      },
      progress);

  const double sample_bytes = 4.0 * samples.length * config.hidden_size * (config.num_layers + 1);
  const int group = std::clamp(static_cast<int>(kActivationBytes / sample_bytes), samples_per_step(samples), samples.count);
  const int step = samples_per_step(samples), steps = (samples.count + step - 1) / step;
  ProgressStage stage(progress, "perturbing layers",
                      static_cast<std::size_t>(steps) * config.num_layers * (config.num_layers + 3) / 2);
  std::vector<std::vector<double>> changes(static_cast<std::size_t>(config.num_layers));
  for (int begin = 0; begin < samples.count; begin += group / step * step) {
    GroupProbe probe(model, samples, begin, std::min(begin + group / step * step, samples.count));
    for (int layer = 0; layer < config.num_layers; ++layer)
      probe.run_layer(layer, noise[static_cast<std::size_t>(layer)], options.seed, stage);
    probe.measure(changes);
  }
  for (int layer = 0; layer < config.num_layers; ++layer)
    fill_statistics(results[layer_name(layer)], changes[static_cast<std::size_t>(layer)], options.noise_scale);
  return results;
}

}  // namespace veloxquant
