// Drawing tokens that a model would say next.
#pragma once

#include "mlx/array.h"
#include "veloxquant/model/device.h"

namespace veloxquant {

/// One token of each row of logits [rows, vocab_size] by uniforms [rows] in [0, 1) (kernels/sampling.h) → int32 [rows].
mx::array sample_tokens(const mx::array& logits, const mx::array& uniforms);

/// What log p(token) of such a token gains by the logits → [rows, vocab_size].
mx::array sampled_score(const mx::array& logits, const mx::array& uniforms);

}  // namespace veloxquant
