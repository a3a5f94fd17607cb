#include "veloxquant/calibrate/unit_statistics.h"

#include <algorithm>
#include <cmath>

#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "veloxquant/core/error.h"
#include "veloxquant/core/parallel.h"
#include "veloxquant/core/random.h"
#include "veloxquant/kernels/gemm.h"
#include "veloxquant/quantize/rotated_pq.h"

namespace veloxquant {
namespace {

constexpr float kMostWeight = 100;  // times the mean
constexpr double kWeightPower = 2.0 / 3;

// Of all rows in memory; the rest lies in a file.
constexpr std::size_t kRowBytes = std::size_t{64} << 20, kFileBytes = std::size_t{8} << 30;

}  // namespace

UnitStatisticsStore::UnitStatisticsStore(const ModelConfig& config, int num_samples, int length, const StatisticsOptions& options)
    : layers_(stored_layers(config, options.quantize_sliding)),
      num_kv_heads_(config.num_kv_heads),
      dim_(config.head_dim),
      sinks_(options.sinks),
      num_vectors_(static_cast<double>(num_samples) * (length - options.sinks)),
      metrics_(2 * layers_.size() * static_cast<std::size_t>(config.num_kv_heads),
               SquareMatrix(static_cast<std::size_t>(dim_ * dim_))),
      rows_(kRowBytes),
      steps_(layers_.size()) {
  if (length <= options.sinks)
    throw_invalid("calibrate", "length: expected samples longer than {} sinks, got {} tokens", options.sinks, length);
  // One of each stretch of a sample; every so many-th row is held out.
  const std::size_t affordable = kFileBytes / (metrics_.size() * 2 * static_cast<std::size_t>(dim_) * sizeof(float)),
                    rows = std::min(options.training_rows + options.held_out_rows, affordable),
                    usable = static_cast<std::size_t>(length - options.sinks), count = static_cast<std::size_t>(num_samples),
                    per_sample = std::min((rows + count - 1) / count, usable);
  const double share =
      static_cast<double>(options.held_out_rows) / static_cast<double>(options.training_rows + options.held_out_rows);
  for (int sample = 0; sample < num_samples; ++sample) {
    Random random(options.gradients.seed, static_cast<std::uint64_t>(sample));
    for (std::size_t i = 0; i < per_sample; ++i) {
      const std::size_t begin = usable * i / per_sample, end = usable * (i + 1) / per_sample;
      const auto n = static_cast<double>(places_.size());
      places_.push_back({sample, options.sinks + static_cast<int>(begin + random.below(end - begin)),
                         std::floor((n + 1) * share) > std::floor(n * share)});
    }
  }
}

std::span<const UnitStatisticsStore::Place> UnitStatisticsStore::places_of(int first_sample, int samples) const {
  const auto at = [&](int sample) {
    return std::lower_bound(places_.begin(), places_.end(), sample, [](const Place& place, int s) { return place.sample < s; });
  };
  return {at(first_sample), at(first_sample + samples)};
}

void UnitStatisticsStore::add(const LayerGradients& step) {
  const auto found = std::lower_bound(layers_.begin(), layers_.end(), step.layer);
  if (found == layers_.end() || *found != step.layer) return;
  const auto layer = static_cast<std::size_t>(found - layers_.begin());
  const int count = step.keys.shape(0), length = step.keys.shape(2);
  const auto units = static_cast<std::size_t>(2 * num_kv_heads_), dim = static_cast<std::size_t>(dim_);
  const auto places = places_of(step.first_sample, count);
  std::vector<float> rows(units * places.size() * 2 * dim);
  // A back end may move an array's memory when it is asked for the first time: not from several threads.
  struct SideData {
    const float *vectors, *gradients;
  };
  const SideData sides[] = {{step.keys.data<float>(), step.key_gradients.data<float>()},
                            {step.values.data<float>(), step.value_gradients.data<float>()}};
  parallel_for(units, 1, [&](std::size_t u, std::size_t) {
    const auto& [vectors, gradients] = sides[u / (units / 2)];
    const auto run_of = [&](int sample) {
      const std::size_t head = u % static_cast<std::size_t>(num_kv_heads_),
                        run = static_cast<std::size_t>((sample - step.first_sample) * num_kv_heads_) + head;
      return run * static_cast<std::size_t>(length) * dim;
    };
    std::vector<float> square(dim * dim);
    auto& metric = metrics_[layer * units + u];
    for (int sample = step.first_sample; sample < step.first_sample + count; ++sample) {
      const float* counted = gradients + run_of(sample) + static_cast<std::size_t>(sinks_) * dim;
      gemm(true, false, dim_, dim_, length - sinks_, 1.0f, counted, dim_, counted, dim_, 0.0f, square.data(), dim_);
      for (std::size_t i = 0; i < square.size(); ++i) metric[i] += square[i];
    }
    float* out = rows.data() + u * places.size() * 2 * dim;
    for (const auto& place : places) {
      const std::size_t at = run_of(place.sample) + static_cast<std::size_t>(place.position) * dim;
      out = std::copy_n(vectors + at, dim, out);
      out = std::copy_n(gradients + at, dim, out);
    }
  });
  steps_[layer].push_back(rows_.size());
  rows_.add(mx::array(rows.data(), {static_cast<int>(units), static_cast<int>(places.size()), 2 * dim_}));
}

UnitStatistics UnitStatisticsStore::get(std::size_t index) const {
  const auto of_layer = static_cast<std::size_t>(2 * num_kv_heads_), layer = index / of_layer, unit = index % of_layer,
             dim = static_cast<std::size_t>(dim_);
  UnitStatistics result{.layer = layers_[layer],
                        .side = unit < of_layer / 2 ? Side::kKeys : Side::kValues,
                        .head = static_cast<int>(unit % static_cast<std::size_t>(num_kv_heads_)),
                        .dim = dim_,
                        .metric = metrics_[index],
                        .training = {},
                        .held_out = {}};
  for (double& value : result.metric) value /= num_vectors_;
  auto place = places_.begin();
  for (const std::size_t step : steps_[layer]) {
    const auto rows = mx::contiguous(rows_.get_row(step, static_cast<int>(unit)));
    mx::eval(rows);
    const float* at = rows.data<float>();
    for (int i = 0; i < rows.shape(1); ++i, ++place, at += 2 * dim) {
      auto& to = place->held_out ? result.held_out : result.training;
      to.vectors.insert(to.vectors.end(), at, at + dim);
      to.gradients.insert(to.gradients.end(), at + dim, at + 2 * dim);
      to.samples.push_back(place->sample);
    }
  }
  return result;
}

UnitStatisticsStore unit_statistics(const LanguageModel& model, const TokenBatch& samples, const StatisticsOptions& options,
                                    const ProgressCallback& progress) {
  UnitStatisticsStore store(model.config(), samples.count, samples.length, options);
  likelihood_gradients(
      model, samples, options.gradients, [&](const LayerGradients& step) { store.add(step); }, progress);
  return store;
}

std::vector<float> row_weights(const UnitRows& rows, const SquareMatrix& metric) {
  std::vector<float> weights(rows.count(), 1.0f);
  const bool silent = std::all_of(metric.begin(), metric.end(), [](double value) { return value == 0; });
  if (rows.count() == 0 || silent) return weights;
  const std::size_t dim = rows.vectors.size() / rows.count();
  const auto inverted = inverse(ridged_metric(metric, dim), dim);
  const std::vector<float> matrix(inverted.begin(), inverted.end());
  std::vector<float> product(rows.gradients.size());
  const int n = static_cast<int>(rows.count()), d = static_cast<int>(dim);
  gemm(false, false, n, d, d, 1.0f, rows.gradients.data(), d, matrix.data(), d, 0.0f, product.data(), d);
  const auto scale_to_one = [&] {
    double sum = 0;
    for (const float weight : weights) sum += weight;
    for (float& weight : weights) weight = sum > 0 ? static_cast<float>(weight * static_cast<double>(rows.count()) / sum) : 1.0f;
  };
  for (std::size_t i = 0; i < rows.count(); ++i) {
    double sum = 0;
    for (std::size_t j = i * dim; j < (i + 1) * dim; ++j) sum += static_cast<double>(rows.gradients[j]) * product[j];
    weights[i] = static_cast<float>(std::pow(std::max(sum, 0.0), kWeightPower));
  }
  scale_to_one();
  for (float& weight : weights) weight = std::min(weight, kMostWeight);
  scale_to_one();
  return weights;
}

}  // namespace veloxquant
