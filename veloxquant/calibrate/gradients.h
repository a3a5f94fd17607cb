// What the model's predictions gain by each stored vector: one forward and one backward pass for every unit.
#pragma once

#include <cstdint>
#include <vector>

#include "mlx/array.h"
#include "veloxquant/model/model.h"

namespace veloxquant {

/// Of one layer, [B, num_kv_heads, T, head_dim], evaluated.
struct LayerGradients {
  mx::array keys, values;  // keys before RoPE
};

/// Gradients of Σ_t log p(y_t), where each y_t is drawn from the model's own next-token distribution at its position, by the keys
/// (before RoPE) and values of every layer.  tokens [B, T] int32.
///
/// With g such a gradient, an error e of the stored vector costs ½·E[(gᵀe)²] nats (docs/design.md, adjoint prediction).  Memory:
/// the activations of all layers for these tokens.
std::vector<LayerGradients> likelihood_gradients(const Model& model, const mx::array& tokens, std::uint64_t seed);

}  // namespace veloxquant
