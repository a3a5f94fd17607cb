// What a head stores, and what errors of it cost: the input of fitting and of allocation.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "veloxquant/calibrate/activations.h"
#include "veloxquant/calibrate/gradients.h"
#include "veloxquant/core/parallel.h"
#include "veloxquant/core/progress.h"
#include "veloxquant/quantize/linear_algebra.h"
#include "veloxquant/quantize/registry.h"

namespace veloxquant {

/// Rows of vectors that were kept, with the gradients by them (calibrate/gradients.h), both [rows, head_dim].
struct UnitRows {
  std::vector<float> vectors, gradients;
  std::vector<int> samples;  // [rows]: which sample a row is from

  std::size_t count() const { return samples.size(); }
};

/// Of one layer, side and KV head; keys before RoPE.
struct UnitStatistics {
  int layer = 0;
  Side side = Side::kKeys;
  int head = 0, dim = 0;
  SquareMatrix metric;  // G = E[g gᵀ] over all vectors, [head_dim, head_dim]
  UnitRows training;    // to fit to
  UnitRows held_out;    // other rows, to predict costs on; none of a set of a few tokens
};

struct StatisticsOptions {
  GradientOptions gradients;
  int sinks = 0;                 // first tokens of each sample that are left out, since they are stored exactly
  bool quantize_sliding = true;  // also of layers with a sliding window
  std::size_t training_rows = 40960, held_out_rows = 16384;  // of a unit; fewer where the file of all would take more than 8 GiB
};

/// The units of all layers, or of those that do not slide: keys of all heads, then values, of the first, then of the next, …  Rows
/// lie in a file past a limit.
class UnitStatisticsStore {
 public:
  UnitStatisticsStore(const ModelConfig& config, int num_samples, int length, const StatisticsOptions& options);

  /// What one call of likelihood_gradients's visit says; all samples of a layer in order.
  void add(const LayerGradients& step);

  std::size_t size() const { return metrics_.size(); }
  UnitStatistics get(std::size_t index) const;

 private:
  struct Place {
    int sample, position;
    bool held_out;
  };

  std::span<const Place> places_of(int first_sample, int samples) const;

  std::vector<int> layers_;
  int num_kv_heads_, dim_, sinks_;
  double num_vectors_;
  std::vector<Place> places_;  // ascending in sample and position
  std::vector<SquareMatrix> metrics_;
  Activations rows_;                             // [units of a layer, places, vector and gradient], by layer and step
  std::vector<std::vector<std::size_t>> steps_;  // of each layer, where in rows_
};

/// Rows are drawn evenly over all samples and positions.  Throws as likelihood_gradients does, and std::invalid_argument for
/// samples that are not longer than sinks.
UnitStatisticsStore unit_statistics(const LanguageModel& model, const TokenBatch& samples, const StatisticsOptions& options,
                                    const ProgressCallback& progress = {});

/// Calls work(index, unit) for all units, on all threads; a unit for each thread is in memory.
template <class Work>
void for_each_unit(const UnitStatisticsStore& store, Work work, ProgressStage& stage) {
  const auto together = static_cast<std::size_t>(num_threads());
  for (std::size_t first = 0; first < store.size(); first += together) {
    std::vector<UnitStatistics> some;
    for (std::size_t i = first; i < std::min(first + together, store.size()); ++i) some.push_back(store.get(i));
    parallel_for(some.size(), 1, [&](std::size_t i, std::size_t) { work(first + i, some[i]); });
    stage.advance(some.size());
  }
}

/// How much each row counts in fitting: (gG⁻¹gᵀ)^⅔ with the metric's ridge, at most 100 times the mean, on average 1; all 1 where
/// every gradient is zero.  One draw of g is a noisy sample of what a vector costs: a power below 1 lost less on other rows than
/// the plain product, which trusts it.
std::vector<float> row_weights(const UnitRows& rows, const SquareMatrix& metric);

}  // namespace veloxquant
