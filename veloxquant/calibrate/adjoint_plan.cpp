#include "veloxquant/calibrate/adjoint_plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>
#include <tuple>

#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "veloxquant/cache/restoring_cache.h"
#include "veloxquant/calibrate/adjoint_costs.h"
#include "veloxquant/calibrate/observe.h"
#include "veloxquant/calibrate/recall.h"
#include "veloxquant/core/error.h"
#include "veloxquant/core/parallel.h"
#include "veloxquant/core/random.h"
#include "veloxquant/model/divergence.h"
namespace veloxquant {
namespace {
struct Timer {
  const char* n;
  std::chrono::steady_clock::time_point t = std::chrono::steady_clock::now();
  ~Timer() { fmt::print(stderr, "{} {:.1f}\n", n, std::chrono::duration<double>(std::chrono::steady_clock::now() - t).count()); }
};

// Units whose predicted cost is checked by measuring it, on so many samples of either kind.
constexpr std::size_t kMeasuredUnits = 8;
constexpr int kMeasuredSamples = 2;

// A measurement on few samples says no more than this of a unit's cost relative to that of others.
constexpr double kMostCorrection = 3;

// Samples with facts whose answers are asked for at the end.
constexpr int kAskedSamples = 6;

int context_of(const ModelConfig& config, const AdjointPlanOptions& options) {
  return options.context > 0 ? options.context : config.max_position_embeddings;
}

class Planner {
 public:
  Planner(const Model& model, const CalibrationSet& set, const AdjointPlanOptions& options, const ProgressCallback& progress)
      : model_(model), set_(set), options_(options), progress_(progress) {}

  AdjointPlan run() {
    {
      Timer t{"ladders"};
      measure_ladders();
    }
    auto widths = allocation().solve(budget());
    {
      Timer t{"correct"};
      correct(widths);
    }
    const auto corrected = allocation();
    widths = corrected.solve(budget());
    AdjointPlan result{fit(widths), corrected.frontier(), std::nullopt, std::nullopt};
    {
      Timer t{"ask"};
      ask(result);
    }
    return result;
  }

 private:
  Rotation rotation(Side side) const { return side == Side::kKeys ? options_.keys : Rotation::kFull; }

  void measure_ladders() {
    const StatisticsOptions wanted{.gradients = {.window = options_.window, .weights = set_.weights, .seed = options_.seed},
                                   .sinks = options_.sinks};
    store_.emplace(unit_statistics(model_, set_.samples, wanted, progress_));
    std::vector<std::optional<MeasuredUnit>> units(store_->size());
    ProgressStage stage(progress_, "predicting costs", units.size());
    for_each_unit(
        [&](std::size_t i, const UnitStatistics& unit) {
          units[i].emplace(MeasuredUnit{unit.layer, unit.head, unit.side, CostLadder(unit, rotation(unit.side), options_.seed)});
        },
        stage);
    for (auto& unit : units) units_.push_back(std::move(*unit));
  }

  // Calls work(index, unit) for all units, on all threads; a unit for each thread is in memory.
  template <class Work>
  void for_each_unit(Work work, ProgressStage& stage) const {
    const auto together = static_cast<std::size_t>(num_threads());
    for (std::size_t first = 0; first < store_->size(); first += together) {
      std::vector<UnitStatistics> some;
      for (std::size_t i = first; i < std::min(first + together, store_->size()); ++i) some.push_back(store_->get(i));
      parallel_for(some.size(), 1, [&](std::size_t i, std::size_t) { work(first + i, some[i]); });
      stage.advance(some.size());
    }
  }

  WidthAllocation allocation() const {
    return {model_.config(), units_, options_.units, context_of(model_.config(), options_), options_.window + options_.sinks};
  }

  std::int64_t budget() const {
    const auto range = allocation();
    if (options_.bytes) {
      if (*options_.bytes < range.least_bytes() || *options_.bytes > range.most_bytes())
        throw_invalid("calibrate", "bytes: possible are {} to {} at this context, got {}", range.least_bytes(), range.most_bytes(),
                      *options_.bytes);
      return *options_.bytes;
    }
    const std::int64_t bytes = range.bytes_of(options_.bits);
    if (bytes < range.least_bytes() || bytes > range.most_bytes())
      throw_invalid("calibrate", "bits: possible are {:.4f} to {:.4f} at this context, got {}", range.bits_of(range.least_bytes()),
                    range.bits_of(range.most_bytes()), options_.bits);
    return bytes;
  }

  // Measures what the units with most at stake cost at these widths, and scales their ladders by how far that lies from what was
  // predicted, relative to the others: what all have in common does not change an allocation.
  void correct(const std::vector<Width>& widths) {
    std::vector<std::size_t> order(units_.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
      return units_[a].ladder.cost(widths[a].codes, widths[a].patches) > units_[b].ladder.cost(widths[b].codes, widths[b].patches);
    });
    order.resize(std::min(order.size(), kMeasuredUnits));
    std::vector<int> samples;
    for (int i = 0; i < std::min(kMeasuredSamples, set_.running_samples); ++i) samples.push_back(i);
    for (int i = 0; i < std::min(kMeasuredSamples, set_.samples.count - set_.running_samples); ++i)
      samples.push_back(set_.running_samples + i);

    ProgressStage stage(progress_, "measuring units", (order.size() + 1) * samples.size());
    std::vector<double> ratios(order.size());
    std::vector<Restore> restores;
    std::vector<double> predicted, measured(order.size());
    for (const std::size_t i : order) {
      const auto unit = store_->get(i);
      auto quantizer = quick_fit(unit, rotation(unit.side), widths[i].codes, options_.seed);
      quantizer.numbers["patches"] = widths[i].patches;
      predicted.push_back(predicted_cost(unit, quantizer, widths[i].patches, set_.samples.count));
      std::vector<std::optional<QuantizerParameters>> heads(static_cast<std::size_t>(model_.config().num_kv_heads));
      heads[static_cast<std::size_t>(unit.head)] = std::move(quantizer);
      restores.push_back(make_restore(heads));
    }
    const Restore as_it_is{[](const mx::array& x) { return x; }};
    for (const int sample : samples) {
      const auto tokens = token_array(set_.samples, sample, sample + 1);
      std::vector<mx::array> hidden = {model_.forward(tokens, model_.make_caches(FullCache::factory()))};
      stage.advance();
      for (std::size_t k = 0; k < order.size(); ++k) {
        const auto& unit = units_[order[k]];
        const bool keys = unit.side == Side::kKeys;
        hidden.push_back(model_.forward(tokens, model_.make_caches([&](int layer) -> std::unique_ptr<AttentionCache> {
          if (layer != unit.layer) return std::make_unique<FullCache>();
          return std::make_unique<RestoringCache>(keys ? restores[k] : as_it_is, keys ? as_it_is : restores[k],
                                                  ExactTokens{options_.window, options_.sinks});
        })));
        mx::eval(hidden.back());
        stage.advance();
      }
      const auto scores = score_hidden(model_, hidden, {});
      for (std::size_t k = 0; k < order.size(); ++k)
        for (std::size_t t = 0; t < scores[k + 1].size(); ++t) measured[k] += weight(sample, t) * scores[k + 1][t].kl;
    }
    std::vector<double> positive;
    const auto positions = static_cast<double>(samples.size()) * set_.samples.length;
    for (std::size_t k = 0; k < order.size(); ++k) {
      ratios[k] = predicted[k] > 0 ? measured[k] / positions / predicted[k] : 0.0;
      if (ratios[k] > 0) positive.push_back(ratios[k]);
    }
    if (positive.empty()) return;
    std::nth_element(positive.begin(), positive.begin() + static_cast<std::ptrdiff_t>(positive.size() / 2), positive.end());
    const double middle = positive[positive.size() / 2];
    for (std::size_t k = 0; k < order.size(); ++k)
      if (ratios[k] > 0) units_[order[k]].ladder.scale(std::clamp(ratios[k] / middle, 1 / kMostCorrection, kMostCorrection));
  }

  double weight(int sample, std::size_t position) const {
    if (set_.weights.empty()) return 1.0;
    return set_.weights[static_cast<std::size_t>(sample) * static_cast<std::size_t>(set_.samples.length) + position];
  }

  Plan fit(const std::vector<Width>& widths) {
    Timer t{"fit"};
    const ModelConfig& config = model_.config();
    Plan plan{.model = model_.identity(),
              .window = options_.window,
              .sinks = options_.sinks,
              .units = {},
              .provenance = {},
              .predicted_kl = 0.0};
    plan.units.resize(units_.size());
    ProgressStage stage(progress_, "training codebooks", units_.size());
    for_each_unit(
        [&](std::size_t i, const UnitStatistics& unit) {
          const auto& [codes, patches] = widths[i];
          const RotatedPqFitter fitter(unit.training.vectors, config.head_dim,
                                       {unit.metric, row_weights(unit.training, unit.metric)}, rotation(unit.side));
          auto quantizer = fitter.fit(unit.side, {.codes = codes, .patches = patches, .seed = Random(options_.seed, i).next()});
          const double cost = predicted_cost(unit, quantizer, patches, set_.running_samples);
          plan.units[i] = {unit.layer, unit.side, std::move(quantizer), unit.head, cost};
        },
        stage);
    for (const auto& unit : plan.units) *plan.predicted_kl += *unit.predicted_kl;
    const int context = context_of(config, options_);
    plan.provenance = {.program = fmt::format("veloxquant {}", VELOXQUANT_VERSION),
                       .method = "rotated_pq",
                       .units = std::string(to_string(options_.units)),
                       .bits = options_.bytes ? allocation().bits_of(*options_.bytes) : options_.bits,
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

  const Model& model_;
  const CalibrationSet& set_;
  const AdjointPlanOptions& options_;
  const ProgressCallback& progress_;
  std::vector<MeasuredUnit> units_;  // in a plan's order
  std::optional<UnitStatisticsStore> store_;
};

}  // namespace

void check_adjoint_plan_options(const ModelConfig& config, const AdjointPlanOptions& options) {
  const int context = context_of(config, options), exact = options.window + options.sinks;
  if (context <= exact)
    throw_invalid("calibrate", "context: expected more than the {} tokens of window and sinks, got {}", exact, context);
  if (options.keys == Rotation::kPlane && config.head_dim % 2 != 0)
    throw_invalid("calibrate", "keys: plane needs an even head_dim, got {}", config.head_dim);
}

AdjointPlan make_adjoint_plan(const Model& model, const CalibrationSet& set, const AdjointPlanOptions& options,
                              const ProgressCallback& progress) {
  check_adjoint_plan_options(model.config(), options);
  return Planner(model, set, options, progress).run();
}

}  // namespace veloxquant
