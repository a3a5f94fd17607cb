// What a model's layers store while it reads samples.
#pragma once

#include <functional>
#include <span>

#include "mlx/array.h"
#include "veloxquant/core/progress.h"
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
