#include "veloxquant/calibrate/make_plan.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>

#include "veloxquant/calibrate/observe.h"
#include "veloxquant/calibrate/sensitivity.h"
#include "veloxquant/core/error.h"
#include "veloxquant/core/random.h"
#include "veloxquant/core/warning.h"
#include "veloxquant/plan/allocation.h"
#include "veloxquant/plan/distortion_curve.h"
#include "veloxquant/quantize/distortion.h"

namespace veloxquant {
namespace {

constexpr double kRounding = 1e-9;

// Rates at which distortions are measured and curves fitted; widths beyond the last are not allocated.
const std::vector<double> kRates = {1.0, 1.5, 2.0, 3.0, 4.0};

// What there is to choose from for one head dimension: widths, ascending, and the bits that each takes.
struct Ladder {
  std::vector<double> widths, rates;
};

Ladder ladder_of(const QuantizerMethod& method, Units units, int head_dim) {
  check_dim(method, head_dim);
  Ladder ladder{.widths = method.widths(head_dim), .rates = {}};
  if (units == Units::kLayer) std::erase_if(ladder.widths, [](double width) { return width > kRates.back(); });
  for (const double width : ladder.widths) ladder.rates.push_back(method.rate(head_dim, width));
  return ladder;
}

void check_bits(const QuantizerMethod& method, const Ladder& ladder, const PlanOptions& options, int head_dim) {
  if (!(options.bits >= ladder.rates.front() - kRounding && options.bits <= ladder.rates.back() + kRounding))
    throw_invalid("calibrate", "bits: {} with {} and head_dim {} offers {:.4g} to {:.4g} bits, got {}", options.method,
                  options.units == Units::kLayer ? "a width per layer" : "one width", head_dim, ladder.rates.front(),
                  ladder.rates.back(), options.bits);
  if (options.units == Units::kUniform && method.learns()) method.rate(head_dim, options.bits);  // throws between two widths
}

double uniform_width(const QuantizerMethod& method, const Ladder& ladder, const PlanOptions& options) {
  // Codes without scales or norms: the bits say the number of sub-spaces, and nothing else is meant.
  if (method.learns()) return options.bits;
  std::size_t best = 0;
  while (best + 1 < ladder.rates.size() && ladder.rates[best + 1] <= options.bits + kRounding) ++best;
  if (ladder.rates[best] < options.bits - kRounding)
    warn(fmt::format("one width for all layers gives {:.4g} bits (possible: {:.4g}); a width per layer comes closer to {:.4g}",
                     ladder.rates[best], fmt::join(ladder.rates, ", "), options.bits));
  return ladder.widths[best];
}

// One width per layer of least predicted KL, in the documented way.
std::vector<double> scalar_widths(const QuantizerMethod& method, const Ladder& ladder,
                                  const LayerMap<SensitivityResult>& sensitivities, const PlanOptions& options) {
  const auto curves = fit_distortion_curve(sensitivities, kRates, std::string(method.name));
  // Scales and norms cost every layer the same: what is left of the budget goes to codes.
  const double overhead = ladder.rates.front() - ladder.widths.front();
  const int least = static_cast<int>(ladder.widths.front()), most = static_cast<int>(ladder.widths.back());
  const double target = std::clamp<double>(options.bits - overhead, least, most);
  std::vector<double> widths;
  for (const auto& [name, bits] : allocate_bits_ratequant(curves, target, least, most)) widths.push_back(bits);
  return widths;
}

double sensitivity_squared(const SensitivityResult& result) {
  return result.mean_sensitivity * result.mean_sensitivity + result.std_sensitivity * result.std_sensitivity;
}

// The mean of the relative distortions of a layer's keys and values.
double layer_distortion(const QuantizerMethod& method, const LayerObservation& observation, const TokenBatch& samples, int head_dim,
                        double width, std::uint64_t seed) {
  double sum = 0;
  for (const Side side : {Side::kKeys, Side::kValues})
    sum += relative_distortions(method, side, observation.span(side), static_cast<std::size_t>(samples.length), head_dim, {width},
                                seed)[0];
  return sum / 2;
}

// The same for quantizers that learn, by what each width is measured to lose: their widths lie on no curve.
std::vector<double> learned_widths(const LanguageModel& model, const TokenBatch& samples, const QuantizerMethod& method,
                                   Ladder ladder, const LayerMap<SensitivityResult>& sensitivities, const PlanOptions& options,
                                   const ProgressCallback& progress) {
  const auto layers = stored_layers(model.config(), options.quantize_sliding);
  while (ladder.widths.size() > 1 && ladder.widths.front() < kRates.front() && ladder.widths[1] <= options.bits)
    ladder.widths.erase(ladder.widths.begin());
  const int head_dim = model.config().head_dim;
  std::vector<std::vector<AllocationOption>> units;
  observe_layers(
      model, samples,
      [&](int layer, const LayerObservation& observation) {
        if (!std::binary_search(layers.begin(), layers.end(), layer)) return;
        const double factor = sensitivity_squared(sensitivities.at(layer_name(layer))) / 2;
        units.emplace_back();
        for (const double width : ladder.widths) {
          // In bits of a whole vector, which are whole numbers.
          const auto cost = static_cast<std::int64_t>(std::llround(width * head_dim));
          units.back().push_back({cost, factor * layer_distortion(method, observation, samples, head_dim, width, options.seed)});
        }
      },
      progress);
  const auto choice = allocate(
      units, static_cast<std::int64_t>(std::floor(options.bits * head_dim * static_cast<double>(units.size()) + kRounding)));
  std::vector<double> widths;
  for (const int rung : choice) widths.push_back(ladder.widths[static_cast<std::size_t>(rung)]);
  return widths;
}

// Fits every unit at its layer's width; the predicted KL where sensitivities are known.
void fit_units(const LanguageModel& model, const TokenBatch& samples, const QuantizerMethod& method,
               const std::vector<double>& widths, const LayerMap<SensitivityResult>& sensitivities, const PlanOptions& options,
               Plan& plan, const ProgressCallback& progress) {
  const int head_dim = model.config().head_dim;
  const auto layers = stored_layers(model.config(), options.quantize_sliding);
  double predicted = 0;
  const auto fit_layer = [&](int layer, const LayerObservation* observation) {
    const auto at = std::lower_bound(layers.begin(), layers.end(), layer);
    if (at == layers.end() || *at != layer) return;
    double distortion = 0;
    for (const Side side : {Side::kKeys, Side::kValues}) {
      const std::span<const float> vectors = observation ? observation->span(side) : std::span<const float>();
      const FitOptions fit{.side = side,
                           .width = widths[static_cast<std::size_t>(at - layers.begin())],
                           .seed = Random(options.seed, static_cast<std::uint64_t>(layer)).next()};
      plan.units.push_back({layer, side, method.fit(vectors, head_dim, fit)});
      if (observation && !sensitivities.empty())
        distortion +=
            restored_distortion(*make_quantizer(plan.units.back().quantizer), vectors, static_cast<std::size_t>(samples.length)) /
            2;
    }
    if (!sensitivities.empty()) predicted += sensitivity_squared(sensitivities.at(layer_name(layer))) / 2 * distortion;
  };
  if (!reads_samples(options)) {
    for (int layer = 0; layer < model.config().num_layers; ++layer) fit_layer(layer, nullptr);
    return;
  }
  observe_layers(
      model, samples, [&](int layer, const LayerObservation& observation) { fit_layer(layer, &observation); }, progress);
  if (!sensitivities.empty()) plan.predicted_kl = predicted;
}

}  // namespace

std::vector<SlidingLayer> sliding_layers(const ModelConfig& config, bool quantize_sliding) {
  std::vector<SlidingLayer> sliding;
  if (quantize_sliding) return sliding;
  for (int i = 0; i < config.num_layers; ++i)
    if (const int window = config.layers[static_cast<std::size_t>(i)].sliding_window; window > 0) sliding.push_back({i, window});
  return sliding;
}

void check_stored_layers(const ModelConfig& config, bool quantize_sliding) {
  if (stored_layers(config, quantize_sliding).empty())
    throw_invalid(
        "calibrate",
        "sliding: full leaves nothing to store in few bits: all {} layers have a sliding window; quantize stores them too",
        config.num_layers);
}

std::string_view to_string(Units units) {
  constexpr std::string_view kNames[] = {"uniform", "layer", "kv", "head"};
  return kNames[static_cast<std::size_t>(units)];
}

bool reads_samples(const PlanOptions& options) {
  return options.units == Units::kLayer || quantizer_method(options.method).learns();
}

void check_plan_options(const ModelConfig& config, const PlanOptions& options, int num_samples, int length) {
  const QuantizerMethod& method = quantizer_method(options.method);
  if (method.keys_before_rope) throw_invalid("calibrate", "{} has a way of its own, make_adjoint_plan", options.method);
  if (options.units != Units::kUniform && options.units != Units::kLayer)
    throw_invalid("calibrate", "units: {} offers uniform and layer, got {}", options.method, to_string(options.units));
  check_stored_layers(config, options.quantize_sliding);
  const Ladder ladder = ladder_of(method, options.units, config.head_dim);
  check_bits(method, ladder, options, config.head_dim);
  check_batch_size(num_samples, length);
  const std::int64_t vectors = std::int64_t{num_samples} * length * config.num_kv_heads;
  if (vectors < method.least_vectors)
    throw_invalid("calibrate", "samples: {} needs at least {} vectors a layer, and {} samples of {} tokens with {} KV heads are {}",
                  method.name, method.least_vectors, num_samples, length, config.num_kv_heads, vectors);
}

Plan make_plan(const LanguageModel& model, const TokenBatch& samples, const PlanOptions& options,
               const ProgressCallback& progress) {
  check_plan_options(model.config(), options, samples.count, samples.length);
  const QuantizerMethod& method = quantizer_method(options.method);
  const Ladder ladder = ladder_of(method, options.units, model.config().head_dim);
  const bool reads = reads_samples(options);

  const auto sliding = sliding_layers(model.config(), options.quantize_sliding);
  LayerMap<SensitivityResult> sensitivities;
  std::vector<double> widths;
  if (options.units == Units::kUniform) {
    widths.assign(stored_layers(model.config(), options.quantize_sliding).size(), uniform_width(method, ladder, options));
  } else {
    ProbeOptions probe{.seed = options.seed, .quantizers = {}, .rates = kRates};
    if (!method.learns()) probe.quantizers = {options.method};
    sensitivities = probe_sensitivities(model, samples, probe, progress);
    for (const auto& layer : sliding) sensitivities.erase(layer_name(layer.layer));
    widths = method.learns() ? learned_widths(model, samples, method, ladder, sensitivities, options, progress)
                             : scalar_widths(method, ladder, sensitivities, options);
  }
  Plan plan;
  plan.model = model.identity();
  plan.sliding = sliding;
  fit_units(model, samples, method, widths, sensitivities, options, plan, progress);
  plan.provenance = {.program = fmt::format("veloxquant {}", VELOXQUANT_VERSION),
                     .method = options.method,
                     .units = std::string(to_string(options.units)),
                     .bits = options.bits,
                     .context = options.context > 0 ? options.context : model.config().max_position_embeddings,
                     .texts = {},
                     .num_samples = reads ? samples.count : 0,
                     .sequence_length = reads ? samples.length : 0,
                     .seed = options.seed,
                     .device = std::string(device_name(mx::default_device()))};
  check_plan(plan);
  return plan;
}

}  // namespace veloxquant
