#include "veloxquant/calibrate/adjoint_plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "veloxquant/cache/restoring_cache.h"
#include "veloxquant/calibrate/adjoint_costs.h"
#include "veloxquant/calibrate/make_plan.h"
#include "veloxquant/calibrate/observe.h"
#include "veloxquant/calibrate/recall.h"
#include "veloxquant/core/error.h"
#include "veloxquant/core/parallel.h"
#include "veloxquant/core/random.h"
#include "veloxquant/model/divergence.h"

namespace veloxquant {
namespace {

// Units whose predicted cost is checked by measuring it, on so many samples of running text and with facts.
constexpr std::size_t kMeasuredUnits = 6;
constexpr int kMeasuredRunning = 2, kMeasuredFacts = 1;

// A measurement on few samples says no more than this of a unit's cost relative to that of others.
constexpr double kMostCorrection = 3;

// Samples with facts whose answers are asked for at the end.
constexpr int kAskedSamples = 4;

int context_of(const ModelConfig& config, const AdjointPlanOptions& options) {
  return options.context > 0 ? options.context : config.max_position_embeddings;
}

// What is left of the bytes asked for once layers that slide are kept.
std::int64_t bytes_for_units(const ModelConfig& config, const AdjointPlanOptions& options) {
  ModelIdentity shape;
  shape.num_kv_heads = config.num_kv_heads;
  shape.head_dim = config.head_dim;
  return *options.bytes - sliding_bytes(shape, sliding_layers(config, options.quantize_sliding), context_of(config, options));
}

class Planner {
 public:
  Planner(const LanguageModel& model, const CalibrationSet& set, const AdjointPlanOptions& options,
          const ProgressCallback& progress)
      : model_(model), set_(set), options_(options), progress_(progress) {}

  AdjointPlan run() {
    measure_ladders();
    const auto first = allocation();
    const std::int64_t bytes = options_.bytes ? bytes_for_units(model_.config(), options_) : first.bytes_of(options_.bits);
    correct(first.solve(bytes));
    const auto corrected = allocation();
    const auto widths = corrected.solve(bytes);
    AdjointPlan result{fit(widths, options_.bytes ? corrected.bits_of(bytes) : options_.bits), corrected.frontier(), std::nullopt,
                       std::nullopt};
    // Ladders are of quick codebooks over all samples, the plan's prediction of full ones over running text.
    if (const double quick = ladder_cost(widths); quick > 0)
      for (auto& point : result.frontier) point.predicted_kl *= *result.plan.predicted_kl / quick;
    ask(result);
    return result;
  }

 private:
  Rotation rotation(Side side) const { return side == Side::kKeys ? options_.keys : Rotation::kFull; }

  void measure_ladders() {
    const StatisticsOptions wanted{.gradients = {.window = options_.window, .weights = set_.weights, .seed = options_.seed},
                                   .sinks = options_.sinks,
                                   .quantize_sliding = options_.quantize_sliding};
    store_.emplace(unit_statistics(model_, set_.samples, wanted, progress_));
    std::vector<std::optional<MeasuredUnit>> units(store_->size());
    ProgressStage stage(progress_, "predicting costs", units.size());
    for_each_unit(
        *store_,
        [&](std::size_t i, const UnitStatistics& unit) {
          units[i].emplace(MeasuredUnit{unit.layer, unit.head, unit.side, CostLadder(unit, rotation(unit.side), options_.seed)});
        },
        stage);
    for (auto& unit : units) units_.push_back(std::move(*unit));
  }

  WidthAllocation allocation() const {
    return {model_.config(), units_, options_.units, context_of(model_.config(), options_), options_.window + options_.sinks};
  }

  double ladder_cost(const std::vector<Width>& widths) const {
    double sum = 0;
    for (std::size_t i = 0; i < units_.size(); ++i) sum += units_[i].ladder.cost(widths[i].codes, widths[i].patches);
    return sum;
  }

  // Measures what the units with most at stake cost at these widths, and scales their ladders by how far that lies from what was
  // predicted, relative to one another: what all have in common does not change an allocation.
  void correct(const std::vector<Width>& widths) {
    const auto at_stake = units_at_stake(widths);
    std::vector<double> predicted;
    std::vector<Restore> restores;
    for (const std::size_t i : at_stake) {
      const auto unit = store_->get(i);
      auto quantizer = quick_fit(unit, rotation(unit.side), widths[i].codes, options_.seed);
      predicted.push_back(predicted_cost(unit, quantizer, widths[i].patches, set_.samples.count));
      quantizer.numbers["patches"] = widths[i].patches;
      std::vector<std::optional<QuantizerParameters>> heads(static_cast<std::size_t>(model_.config().num_kv_heads));
      heads[static_cast<std::size_t>(unit.head)] = std::move(quantizer);
      restores.push_back(make_restore(heads));
    }
    const auto measured = measure(at_stake, restores);
    std::vector<double> ratios;
    for (std::size_t k = 0; k < at_stake.size(); ++k)
      if (predicted[k] > 0 && measured[k] > 0) ratios.push_back(measured[k] / predicted[k]);
    if (ratios.empty()) return;
    const auto middle = ratios.begin() + static_cast<std::ptrdiff_t>(ratios.size() / 2);
    std::nth_element(ratios.begin(), middle, ratios.end());
    for (std::size_t k = 0; k < at_stake.size(); ++k)
      if (predicted[k] > 0 && measured[k] > 0)
        units_[at_stake[k]].ladder.scale(std::clamp(measured[k] / predicted[k] / *middle, 1 / kMostCorrection, kMostCorrection));
  }

  std::vector<std::size_t> units_at_stake(const std::vector<Width>& widths) const {
    const auto cost = [&](std::size_t i) { return units_[i].ladder.cost(widths[i].codes, widths[i].patches); };
    std::vector<std::size_t> order(units_.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return cost(a) > cost(b); });
    order.resize(std::min(order.size(), kMeasuredUnits));
    return order;
  }

  // The weighted KL of storing one of `units` as its entry of `restores` does, on some samples: nats a token.
  std::vector<double> measure(const std::vector<std::size_t>& units, const std::vector<Restore>& restores) const {
    std::vector<int> samples;
    for (int i = 0; i < std::min(kMeasuredRunning, set_.running_samples); ++i) samples.push_back(i);
    for (int i = set_.running_samples; i < std::min(set_.running_samples + kMeasuredFacts, set_.samples.count); ++i)
      samples.push_back(i);
    ProgressStage stage(progress_, "measuring units", (units.size() + 1) * samples.size());
    const Restore as_it_is{[](const mx::array& x) { return x; }};
    std::vector<double> sums(units.size());
    for (const int sample : samples) {
      const auto tokens = token_array(set_.samples, sample, sample + 1);
      std::vector<mx::array> hidden = {model_.forward(tokens, model_.make_caches(FullCache::factory()))};
      stage.advance();
      for (std::size_t k = 0; k < units.size(); ++k) {
        const auto& unit = units_[units[k]];
        const bool keys = unit.side == Side::kKeys;
        const auto factory = [&](int layer) -> std::unique_ptr<AttentionCache> {
          if (layer != unit.layer) return std::make_unique<FullCache>();
          return std::make_unique<RestoringCache>(keys ? restores[k] : as_it_is, keys ? as_it_is : restores[k],
                                                  ExactTokens{options_.window, options_.sinks, /* eight_bits= */ false});
        };
        hidden.push_back(model_.forward(tokens, model_.make_caches(factory)));
        mx::eval(hidden.back());
        stage.advance();
      }
      const auto scores = score_hidden(model_, hidden, {});
      for (std::size_t k = 0; k < units.size(); ++k)
        for (std::size_t t = 0; t < scores[k + 1].size(); ++t) sums[k] += weight(sample, t) * scores[k + 1][t].kl;
    }
    for (double& sum : sums) sum /= static_cast<double>(samples.size()) * set_.samples.length;
    return sums;
  }

  double weight(int sample, std::size_t position) const {
    if (set_.weights.empty()) return 1.0;
    return set_.weights[static_cast<std::size_t>(sample) * static_cast<std::size_t>(set_.samples.length) + position];
  }

  Plan fit(const std::vector<Width>& widths, double bits) {
    const ModelConfig& config = model_.config();
    Plan plan{.model = model_.identity(),
              .window = options_.window,
              .sinks = options_.sinks,
              .units = {},
              .sliding = sliding_layers(config, options_.quantize_sliding),
              .provenance = {},
              .predicted_kl = 0.0};
    plan.units.resize(units_.size());
    ProgressStage stage(progress_, "training codebooks", units_.size());
    for_each_unit(
        *store_,
        [&](std::size_t i, const UnitStatistics& unit) {
          const auto& [codes, patches] = widths[i];
          const RotatedPqFitter fitter(unit.training.vectors, config.head_dim,
                                       {unit.metric, row_weights(unit.training, unit.metric)}, rotation(unit.side));
          auto quantizer = fitter.fit(unit.side, {.codes = codes,
                                                  .stages = stages_for(unit.training.count()),
                                                  .patches = patches,
                                                  .seed = Random(options_.seed, i).next()});
          const double cost = predicted_cost(unit, quantizer, patches, set_.running_samples);
          plan.units[i] = {unit.layer, unit.side, std::move(quantizer), unit.head, cost};
        },
        stage);
    for (const auto& unit : plan.units) *plan.predicted_kl += *unit.predicted_kl;
    const int context = context_of(config, options_);
    plan.provenance = {.program = fmt::format("veloxquant {}", VELOXQUANT_VERSION),
                       .method = "rotated_pq",
                       .units = std::string(to_string(options_.units)),
                       .bits = bits,
                       .context = context,
                       .texts = {},
                       .num_samples = set_.samples.count,
                       .sequence_length = set_.samples.length,
                       .seed = options_.seed,
                       .device = std::string(device_name(mx::default_device()))};
    check_plan(plan);
    return plan;
  }

  void ask(AdjointPlan& result) const {
    const int asked = std::min(kAskedSamples, set_.samples.count - set_.running_samples);
    if (asked == 0) return;
    ProgressStage stage(progress_, "asking for facts", static_cast<std::size_t>(asked) * 2);
    const auto share = [&](const CacheFactory& factory) {
      RecallCount count;
      for (int i = 0; i < asked; ++i) {
        count += recall(model_, set_.samples.row(set_.running_samples + i), set_.answers[static_cast<std::size_t>(i)], factory);
        stage.advance();
      }
      return count.share();
    };
    result.full_recall = share(FullCache::factory());
    result.plan_recall = share(restoring_factory(result.plan));
  }

  const LanguageModel& model_;
  const CalibrationSet& set_;
  const AdjointPlanOptions& options_;
  const ProgressCallback& progress_;
  std::vector<MeasuredUnit> units_;  // in a plan's order
  std::optional<UnitStatisticsStore> store_;
};

}  // namespace

void check_adjoint_plan_options(const ModelConfig& config, const AdjointPlanOptions& options, int length) {
  const int context = context_of(config, options), exact = options.window + options.sinks;
  if (context <= exact)
    throw_invalid("calibrate", "context: expected more than the {} tokens of window and sinks, got {}", exact, context);
  if (length <= exact)
    throw_invalid("calibrate", "length: expected samples longer than the {} tokens of window and sinks, got {}", exact, length);
  if (options.keys == Rotation::kPlane && config.head_dim % 2 != 0)
    throw_invalid("calibrate", "keys: plane needs an even head_dim, got {}", config.head_dim);
  for (const auto& rope : config.ropes)
    if (const int dims = rope.dims.value_or(config.head_dim);
        options.keys == Rotation::kPlane && dims != config.head_dim && dims != 0)
      throw_invalid("calibrate", "keys: plane needs RoPE that turns whole heads, got {} of {} dimensions", dims, config.head_dim);
  check_stored_layers(config, options.quantize_sliding);
  const std::size_t layers = stored_layers(config, options.quantize_sliding).size();
  const auto [least, most] = possible_bytes(config, layers, context, exact);
  if (options.bytes) {
    const std::int64_t bytes = bytes_for_units(config, options), sliding = *options.bytes - bytes;
    if (bytes < least || bytes > most)
      throw_invalid("calibrate", "bytes: possible are {} to {} for {} tokens, got {}", least + sliding, most + sliding, context,
                    *options.bytes);
    return;
  }
  const auto bits = [&](std::int64_t bytes) {
    return 8.0 * static_cast<double>(bytes) / (2.0 * static_cast<double>(layers) * config.num_kv_heads * config.head_dim * context);
  };
  // Rounded towards the inside, so that what the message says is accepted.
  if (!(options.bits >= bits(least) && options.bits <= bits(most)))
    throw_invalid("calibrate", "bits: possible are {:.4f} to {:.4f} at {} tokens, got {}", std::ceil(bits(least) * 1e4) / 1e4,
                  std::floor(bits(most) * 1e4) / 1e4, context, options.bits);
}

AdjointPlan make_adjoint_plan(const LanguageModel& model, const CalibrationSet& set, const AdjointPlanOptions& options,
                              const ProgressCallback& progress) {
  check_adjoint_plan_options(model.config(), options, set.samples.length);
  return Planner(model, set, options, progress).run();
}

}  // namespace veloxquant
