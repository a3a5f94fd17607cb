#include "veloxquant/calibrate/gradients.h"

#include <algorithm>
#include <cmath>

#include "mlx/device.h"
#include "mlx/ops.h"
#include "mlx/random.h"
#include "mlx/transforms.h"
#include "veloxquant/calibrate/activations.h"
#include "veloxquant/calibrate/observe.h"
#include "veloxquant/core/error.h"
#include "veloxquant/core/random.h"
#include "veloxquant/model/attention.h"
#include "veloxquant/model/sampling.h"
#include "veloxquant/model/tap.h"
#include "veloxquant/plan/layer_map.h"

namespace veloxquant {
namespace {

// Tokens that go through the layers together.
constexpr int kStepTokens = 2048;

// Attends at full precision; gradients by the stored copies of keys (before RoPE) and values are also those of two probes.
class TappedCache : public AttentionCache {
 public:
  TappedCache(mx::array keys_probe, mx::array values_probe, int window)
      : keys_probe_(std::move(keys_probe)), values_probe_(std::move(values_probe)), window_(window) {}

  mx::array attend(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionSpec& spec) override {
    keys_ = k;
    values_ = v;
    const Rope& rope = *spec.rope;
    std::optional<NearTokens> near;
    if (window_ > 0) near = NearTokens{window_, rope(k, 0), v};
    return causal_attention(rope(q, 0), rope(tap(k, keys_probe_), 0), tap(v, values_probe_), spec, near);
  }
  int offset() const override { return keys_ ? keys_->shape(2) : 0; }
  std::size_t nbytes() const override { return 0; }

  const mx::array& keys() const { return *keys_; }
  const mx::array& values() const { return *values_; }

 private:
  mx::array keys_probe_, values_probe_;
  int window_;
  std::optional<mx::array> keys_, values_;
};

// What Σ_t √weight_t · log p(y_t) gains by hidden states [B, T, hidden_size] after the last layer.
mx::array head_gradient(const LanguageModel& model, const mx::array& hidden, std::span<const float> weights, std::uint64_t seed) {
  const int width = hidden.shape(-1), rows = hidden.shape(0) * hidden.shape(1);
  const auto flat = mx::reshape(hidden, {rows, width});
  const auto uniforms = mx::random::uniform({rows}, mx::float32, mx::random::key(seed));
  std::vector<mx::array> gradients;
  for (int begin = 0; begin < rows; begin += model.logit_rows()) {
    const int end = std::min(begin + model.logit_rows(), rows);
    const auto some = mx::slice(flat, {begin, 0}, {end, width});
    auto score = sampled_score(model.logits(some), mx::slice(uniforms, {begin}, {end}));
    if (!weights.empty()) score = mx::multiply(score, mx::sqrt(mx::array(weights.data() + begin, {end - begin, 1})));
    gradients.push_back(model.hidden_gradient(some, score));
    mx::eval(gradients.back());
  }
  return mx::reshape(mx::concatenate(gradients, 0), hidden.shape());
}

void check_weights(const GradientOptions& options, const TokenBatch& samples) {
  if (options.weights.empty()) return;
  if (options.weights.size() != samples.tokens.size())
    throw_invalid("gradients", "weights: expected {}, got {}", samples.tokens.size(), options.weights.size());
  for (const float weight : options.weights)
    if (!(weight >= 0) || !std::isfinite(weight)) throw_invalid("gradients", "weights: expected numbers from 0, got {}", weight);
}

void check_finite(const LayerGradients& gradients) {
  for (const auto& [x, what] :
       {std::pair(&gradients.keys, "keys"), std::pair(&gradients.values, "values"),
        std::pair(&gradients.key_gradients, "gradients by keys"), std::pair(&gradients.value_gradients, "gradients by values")})
    if (!mx::all(mx::isfinite(*x)).item<bool>())
      throw_failure("gradients", "{}: the model's {} are not all finite: its weights are damaged or overflow float32",
                    layer_name(gradients.layer), what);
}

bool on_gpu() {
  return mx::default_device() == mx::Device::gpu;
}

// What enters segments may take in memory.  On a GPU it stays there: it has the room, and a file behind a bus would take longer
// than the passes.
std::size_t inputs_limit() {
  return on_gpu() ? std::size_t{16} << 30 : std::size_t{128} << 20;
}

// Bytes that a segment may keep between forward and backward: on a GPU a third of its memory.
double segment_budget() {
  if (!on_gpu()) return 0x1.4p29;
  constexpr double kOtherwise = 0x1p33;
  const auto& info = mx::device_info(mx::default_device());
  for (const char* name : {"total_memory", "memory_size"})
    if (const auto found = info.find(name); found != info.end())
      if (const auto* bytes = std::get_if<std::size_t>(&found->second)) return static_cast<double>(*bytes) / 3;
  return kOtherwise;
}

// Floats that the MLPs of a layer keep of a token.
double kept_by_mlps(const ModelConfig& config) {
  const ExpertsConfig& e = config.experts;
  const double visit = on_gpu() ? 4.0 * e.intermediate_size + 2.0 * config.hidden_size : 0.0;  // our kernel makes it once more
  double most = 0;
  for (const LayerConfig& layer : config.layers)
    most = std::max(most, layer.experts ? e.per_token * visit + 2.0 * e.count : 4.0 * config.intermediate_size);
  return most;
}

// Layers that are differentiated as one: as many as stay within the budget for a step of `tokens` in samples of `length`.
int segment_layers(const ModelConfig& config, int tokens, int length) {
  // MLX's own attention beside a window keeps about six arrays of every query by every key (attention_graph).
  const double scores = on_gpu() ? 6.0 * config.num_heads * length : 0.0;
  const double floats = 6.0 * config.hidden_size + 2.0 * (config.num_heads + 2 * config.num_kv_heads) * config.head_dim +
                        kept_by_mlps(config) + scores;
  // The experts of one layer at a time are there in float32.
  const ExpertsConfig& e = config.experts;
  const double experts = on_gpu() ? 3.0 * e.count * e.intermediate_size * config.hidden_size : 0.0;
  const int most = std::max(1, static_cast<int>((segment_budget() / sizeof(float) - experts) / (floats * tokens)));
  const int segments = (config.num_layers + most - 1) / most;
  return (config.num_layers + segments - 1) / segments;
}

// Layers [begin, end) on some samples, and what is stored there.
struct Segment {
  int begin, end;
  mx::Shape stored;  // of a layer's keys or values

  // hidden states that enter → those that leave, keys and values by layer; taps: two probes a layer.
  mx::array run(const LanguageModel& model, mx::array hidden, std::span<const mx::array> taps, int window,
                std::vector<mx::array>& keys_and_values) const {
    keys_and_values.clear();
    for (int layer = begin; layer < end; ++layer) {
      const auto at = static_cast<std::size_t>(2 * (layer - begin));
      TappedCache cache(taps[at], taps[at + 1], window);
      hidden = model.layer(layer, hidden, cache);
      keys_and_values.push_back(mx::contiguous(cache.keys()));
      keys_and_values.push_back(mx::contiguous(cache.values()));
    }
    return hidden;
  }
};

// An array's value outside the graph that is being differentiated.
mx::array detached(const mx::array& x) {
  mx::eval(x);
  auto copy = mx::array::unsafe_weak_copy(x);
  copy.set_status(mx::array::Status::available);
  return copy;
}

}  // namespace

void likelihood_gradients(const LanguageModel& model, const TokenBatch& samples, const GradientOptions& options,
                          const std::function<void(const LayerGradients&)>& visit, const ProgressCallback& progress) {
  check_weights(options, samples);
  const ModelConfig& config = model.config();
  const int num_layers = config.num_layers, step = std::clamp(kStepTokens / samples.length, 1, samples.count),
            num_steps = (samples.count + step - 1) / step;
  const int length = segment_layers(config, step * samples.length, samples.length), last_begin = (num_layers - 1) / length * length;
  const auto count_of = [&](int i) { return std::min(step, samples.count - i * step); };
  ProgressStage stage(progress, "one pass forward, one backward", static_cast<std::size_t>(num_steps) * (num_layers + last_begin));

  Activations inputs(inputs_limit()), gradients(inputs_limit());  // [step, segment], [step]
  for (int i = 0; i < num_steps; ++i) {
    auto hidden = model.embed(token_array(samples, i * step, i * step + count_of(i)));
    for (int layer = 0; layer <= last_begin; ++layer) {
      if (layer % length == 0) inputs.add(hidden);
      if (layer == last_begin) break;
      FullCache cache;
      hidden = model.layer(layer, hidden, cache);
      stage.advance();
    }
  }

  // What leaves the last layer → what Σ √weight · log p gains by it.
  const auto last_gradient = [&](const mx::array& hidden, int i) {
    std::span<const float> weights = options.weights;
    const auto row = static_cast<std::size_t>(samples.length);
    if (!weights.empty())
      weights = weights.subspan(static_cast<std::size_t>(i * step) * row, static_cast<std::size_t>(count_of(i)) * row);
    return head_gradient(model, hidden, weights, Random(options.seed, static_cast<std::uint64_t>(i)).next());
  };

  for (int begin = last_begin; begin >= 0; begin -= length) {
    for (int i = 0; i < num_steps; ++i) {
      const auto at = static_cast<std::size_t>(i);
      const Segment segment{
          begin, std::min(begin + length, num_layers), {count_of(i), config.num_kv_heads, samples.length, config.head_dim}};
      std::vector<mx::array> stored,
          primals = {inputs.get(at * static_cast<std::size_t>(last_begin / length + 1) + static_cast<std::size_t>(begin / length))};
      primals.resize(1 + 2 * static_cast<std::size_t>(segment.end - begin), mx::broadcast_to(mx::array(0.0f), segment.stored));
      // The sum of products with the gradient by what leaves has the segment's gradients, and lets the last one be drawn on the
      // way.
      const auto product = [&](const std::vector<mx::array>& x) {
        const auto hidden = segment.run(model, x[0], std::span(x).subspan(1), options.window, stored);
        const auto gradient = begin == last_begin ? last_gradient(detached(hidden), i) : gradients.get(at);
        return std::vector<mx::array>{mx::sum(mx::multiply(hidden, gradient))};
      };
      auto back = mx::vjp(product, primals, {mx::array(1.0f)}).second;
      for (std::size_t k = 1; k < back.size(); ++k) back[k] = mx::contiguous(back[k]);
      std::vector<mx::array> wanted(back.begin() + (begin > 0 ? 0 : 1), back.end());
      wanted.insert(wanted.end(), stored.begin(), stored.end());
      mx::eval(wanted);
      if (begin > 0 && begin == last_begin) {
        gradients.add(back[0]);
      } else if (begin > 0) {
        gradients.set(at, back[0]);
      }
      for (int layer = segment.end - 1; layer >= begin; --layer) {
        const auto k = static_cast<std::size_t>(2 * (layer - begin));
        const LayerGradients result{layer, i * step, stored[k], stored[k + 1], back[k + 1], back[k + 2]};
        check_finite(result);
        visit(result);
        stage.advance();
      }
    }
  }
}

}  // namespace veloxquant
