// What a model's layers store while it reads samples.
#pragma once

#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "mlx/array.h"
#include "veloxquant/core/progress.h"
#include "veloxquant/model/attention_cache.h"
#include "veloxquant/model/language_model.h"
#include "veloxquant/quantize/registry.h"
#include "veloxquant/text/samples.h"

namespace veloxquant {

/// Attends at full precision and keeps what a layer stores, keys after RoPE: one call, at position 0.
class ObservingCache : public AttentionCache {
 public:
  mx::array attend(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionSpec& spec) override;
  int offset() const override { return keys_ ? keys_->shape(2) : 0; }
  std::size_t nbytes() const override { return keys_ ? keys_->nbytes() + values_->nbytes() : 0; }

  const mx::array& keys() const { return *keys_; }
  const mx::array& values() const { return *values_; }

 private:
  std::optional<mx::array> keys_, values_;
};

/// Keys (after RoPE) and values of one layer, [samples, num_kv_heads, length, head_dim].
class LayerObservation {
 public:
  LayerObservation(int layer, std::size_t values_of_a_side);

  /// Appends what `cache` kept of the next samples.  Throws std::runtime_error that names the layer if a value is not finite.
  void add(const ObservingCache& cache);

  std::span<const float> span(Side side) const { return side == Side::kKeys ? keys_ : values_; }

 private:
  int layer_;
  std::vector<float> keys_, values_;
};

/// Elements of the keys that a layer stores for all samples; its values are as many.
std::size_t observed_elements(const LanguageModel& model, const TokenBatch& samples);

/// Runs all samples through layer 0, calls `visit`, then through layer 1, and so on: one layer's keys and values are in memory at a
/// time.  Throws std::runtime_error if a layer gives a value that is not finite.
void observe_layers(const LanguageModel& model, const TokenBatch& samples,
                    const std::function<void(int layer, const LayerObservation& observation)>& visit,
                    const ProgressCallback& progress = {});

/// Rows [begin, end) of `samples` as an array [end − begin, length] int32.
mx::array token_array(const TokenBatch& samples, int begin, int end);

/// Samples that go through a layer together: as many as make about 4096 tokens, which keeps products large and activations in
/// cache.
int samples_per_step(const TokenBatch& samples);

}  // namespace veloxquant
