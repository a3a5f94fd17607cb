#include "veloxquant/calibrate/adjoint_sensitivity.h"

#include <algorithm>
#include <cmath>

#include "veloxquant/calibrate/adjoint_costs.h"
#include "veloxquant/calibrate/observe.h"
#include "veloxquant/calibrate/sensitivity.h"

namespace veloxquant {
namespace {

// Of one layer and side: what relative white noise needs to know.
struct SideSums {
  double sum = 0, squares = 0, count = 0;      // of keys or values
  std::vector<std::vector<double>> gradients;  // [heads, samples]: Σ‖g‖² over positions

  double variance() const { return std::max(0.0, squares / count - sum / count * (sum / count)); }
};

void add_side(const mx::array& vectors, const mx::array& gradients, int first_sample, SideSums& to) {
  const float *x = vectors.data<float>(), *g = gradients.data<float>();
  const std::size_t heads = to.gradients.size(), run = static_cast<std::size_t>(vectors.shape(2) * vectors.shape(3));
  for (std::size_t b = 0; b < static_cast<std::size_t>(vectors.shape(0)); ++b) {
    for (std::size_t h = 0; h < heads; ++h) {
      double square = 0;
      for (std::size_t i = 0; i < run; ++i, ++x, ++g) {
        to.sum += *x;
        to.squares += static_cast<double>(*x) * *x;
        square += static_cast<double>(*g) * *g;
      }
      to.gradients[h][static_cast<std::size_t>(first_sample) + b] += square;
    }
  }
  to.count += static_cast<double>(vectors.size());
}

double mean(const std::vector<double>& x) {
  double sum = 0;
  for (const double value : x) sum += value;
  return sum / static_cast<double>(x.size());
}

// Of layer i, from its keys and values.
void fill_statistics(const SideSums& keys, const SideSums& values, int length, SensitivityResult& result) {
  std::vector<double> changes(keys.gradients[0].size());
  for (const SideSums* side : {&keys, &values})
    for (const auto& head : side->gradients)
      for (std::size_t sample = 0; sample < changes.size(); ++sample) changes[sample] += side->variance() * head[sample] / length;
  for (double& change : changes) change = std::sqrt(change);
  result.mean_sensitivity = mean(changes);
  for (double& change : changes) change = (change - result.mean_sensitivity) * (change - result.mean_sensitivity);
  result.std_sensitivity = std::sqrt(mean(changes));
}

}  // namespace

AdjointSensitivities adjoint_sensitivities(const LanguageModel& model, const TokenBatch& samples,
                                           const AdjointProbeOptions& options, const ProgressCallback& progress) {
  const ModelConfig& config = model.config();
  const StatisticsOptions wanted{.gradients = {.window = options.window, .weights = {}, .seed = options.seed}};
  UnitStatisticsStore store(config, samples.count, samples.length, wanted);
  const SideSums none{.gradients = std::vector(static_cast<std::size_t>(config.num_kv_heads),
                                               std::vector<double>(static_cast<std::size_t>(samples.count)))};
  std::vector<SideSums> keys(static_cast<std::size_t>(config.num_layers), none), values = keys;
  likelihood_gradients(
      model, samples, wanted.gradients,
      [&](const LayerGradients& step) {
        store.add(step);
        const auto layer = static_cast<std::size_t>(step.layer);
        add_side(step.keys, step.key_gradients, step.first_sample, keys[layer]);
        add_side(step.values, step.value_gradients, step.first_sample, values[layer]);
      },
      progress);

  AdjointSensitivities result;
  observe_layers(
      model, samples,
      [&](int layer, const LayerObservation& observation) {
        auto& of_layer = result.layers[layer_name(layer)];
        of_layer.layer_name = layer_name(layer);
        of_layer.distortions = measure_distortions(observation.span(Side::kKeys), observation.span(Side::kValues), config.head_dim,
                                                   samples.length, {.seed = options.seed});
        fill_statistics(keys[static_cast<std::size_t>(layer)], values[static_cast<std::size_t>(layer)], samples.length, of_layer);
      },
      progress);

  result.units.resize(store.size());
  ProgressStage stage(progress, "predicting costs", store.size());
  for_each_unit(
      store,
      [&](std::size_t i, const UnitStatistics& unit) {
        const auto& side = (unit.side == Side::kKeys ? keys : values)[static_cast<std::size_t>(unit.layer)];
        const double square = mean(side.gradients[static_cast<std::size_t>(unit.head)]) / samples.length;
        result.units[i] = {unit.layer, unit.head, unit.side, std::sqrt(side.variance() * square), {}};
        const CostLadder ladder(unit, Rotation::kFull, options.seed);
        for (const int codes : ladder_codes(unit.dim))
          result.units[i].widths.push_back({8.0 * codes / unit.dim, ladder.cost(codes, 0)});
      },
      stage);
  return result;
}

nlohmann::ordered_json to_json(const AdjointSensitivities& sensitivities) {
  auto json = to_json(sensitivities.layers);
  auto units = nlohmann::ordered_json::array();
  for (const auto& unit : sensitivities.units) {
    auto widths = nlohmann::ordered_json::array();
    for (const auto& [bits, kl] : unit.widths) widths.push_back({{"bits", bits}, {"predicted_kl", kl}});
    units.push_back({{"layer", unit.layer},
                     {"side", to_string(unit.side)},
                     {"head", unit.head},
                     {"sensitivity", unit.sensitivity},
                     {"widths", std::move(widths)}});
  }
  json["units"] = std::move(units);
  return json;
}

}  // namespace veloxquant
