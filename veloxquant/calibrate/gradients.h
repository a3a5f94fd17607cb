// What the model's predictions gain by each stored vector: one forward and one backward pass for every unit.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "mlx/array.h"
#include "veloxquant/core/progress.h"
#include "veloxquant/model/language_model.h"
#include "veloxquant/text/samples.h"

namespace veloxquant {

struct GradientOptions {
  int window = 0;              // so many of the most recent tokens are read exactly: no gradient counts such uses
  std::vector<float> weights;  // [samples, length] or none: what the KL of each position counts, ≥ 0
  std::uint64_t seed = 0;
};

/// Of one layer and some samples, each [B, num_kv_heads, T, head_dim], evaluated; keys before RoPE.
struct LayerGradients {
  int layer, first_sample;
  mx::array keys, values, key_gradients, value_gradients;
};

/// Gradients of Σ_t √weight_t · log p(y_t), where each y_t is drawn from the model's own next-token distribution at its position,
/// by the stored keys (before RoPE) and values of every layer.  Calls `visit` for a segment of the last layers with all samples, a
/// few at a time and in order, then for the layers below, and so on.
///
/// With g such a gradient, an error e of the stored vector costs ½·E[(gᵀe)²] nats of weighted KL (docs/design.md, adjoint
/// prediction).  Segments hold as many layers as fit into some 0.7 GB between forward and backward (8 GB on a GPU), one at least;
/// those below the last one are run twice.  So small models take about 2.4 forward passes, large ones up to 3.4.  What enters the
/// segments lies in a file past 128 MB (16 GB on a GPU).
/// Throws std::invalid_argument for weights of another size, below 0 or not finite, std::runtime_error that names the layer if a
/// key, a value or a gradient is not finite.
void likelihood_gradients(const LanguageModel& model, const TokenBatch& samples, const GradientOptions& options,
                          const std::function<void(const LayerGradients& gradients)>& visit, const ProgressCallback& progress = {});

}  // namespace veloxquant
