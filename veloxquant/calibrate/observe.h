// What a model's layers store while it reads samples.
#pragma once

#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "mlx/array.h"
#include "veloxquant/core/progress.h"
#include "veloxquant/model/attention_cache.h"
#include "veloxquant/model/model.h"
#include "veloxquant/quantize/registry.h"
#include "veloxquant/text/samples.h"

namespace veloxquant {

/// Keys (after RoPE) and values of one layer: float32 [num_samples, num_kv_heads, length, head_dim], row-contiguous and evaluated,
/// so that spans of them may be taken.
struct LayerObservation {
  mx::array keys, values;

  std::span<const float> span(Side side) const;
};

/// Attends at full precision and keeps what it was given, keys and queries after RoPE: one call, at position 0.
class ObservingCache : public AttentionCache {
 public:
  mx::array attend(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionSpec& spec) override;
  int offset() const override { return keys_ ? keys_->shape(2) : 0; }
  std::size_t nbytes() const override { return keys_ ? keys_->nbytes() + values_->nbytes() : 0; }

  const mx::array& queries() const { return *queries_; }
  const mx::array& keys() const { return *keys_; }
  const mx::array& values() const { return *values_; }

 private:
  std::optional<mx::array> queries_, keys_, values_;
};

/// One array of the pieces [samples, num_kv_heads, length, head_dim] of each.  Throws std::runtime_error that names the layer if
/// there is a value that is not finite.
LayerObservation join_observations(int layer, std::vector<mx::array> keys, std::vector<mx::array> values);

/// Runs all samples through layer 0, calls `visit`, then through layer 1, and so on: one layer's keys and values are in memory at a
/// time.  Throws std::runtime_error if a layer gives a value that is not finite.
void observe_layers(const Model& model, const TokenBatch& samples,
                    const std::function<void(int layer, const LayerObservation& observation)>& visit,
                    const ProgressCallback& progress = {});

/// Rows [begin, end) of `samples` as an array [end − begin, length] int32.
mx::array token_array(const TokenBatch& samples, int begin, int end);

/// Samples that go through a layer together: as many as make about 4096 tokens, which keeps products large and activations in
/// cache.
int samples_per_step(const TokenBatch& samples);

}  // namespace veloxquant
