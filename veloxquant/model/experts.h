// Mixture of experts.
#pragma once

#include "mlx/array.h"
#include "veloxquant/model/config.h"
#include "veloxquant/model/matrix.h"
#include "veloxquant/model/ops.h"

namespace veloxquant {

/// Gated MLPs of one shape: down · (activation(gate · x) ⊙ (up · x)).
struct ExpertStacks {
  MatrixStack gate, up, down;
};

/// Sends each token to the experts that a router gives the largest softmax weights, and adds up what they say by those weights
/// (arXiv 1701.06538).  Which experts are chosen is taken as fixed by gradients.
class Experts {
 public:
  /// router: hidden → one score for each expert.
  Experts(Linear router, ExpertStacks experts, const ExpertsConfig& config, Activation activation);

  /// x [..., hidden] → the same shape.
  mx::array operator()(const mx::array& x) const;

 private:
  mx::array by_mlx(const mx::array& x, const mx::array& chosen, const mx::array& weights) const;

  Linear router_;
  ExpertStacks experts_;
  ExpertsConfig config_;
  Activation activation_;
};

}  // namespace veloxquant
