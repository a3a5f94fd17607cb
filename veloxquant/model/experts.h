// Mixture of experts.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "mlx/array.h"
#include "veloxquant/model/config.h"
#include "veloxquant/model/matrix.h"
#include "veloxquant/model/ops.h"

namespace veloxquant {

/// One gated MLP: down · (activation(gate · x) ⊙ (up · x)).
struct Expert {
  Matrix gate, up, down;
};

/// Sends each token to the experts that a router gives the largest softmax weights, and adds up what they say by those weights
/// (arXiv 1701.06538).  Which experts are chosen is taken as fixed by gradients.
class Experts {
 public:
  /// router: hidden → one score for each expert.
  Experts(Linear router, std::vector<Expert> experts, const ExpertsConfig& config, Activation activation);

  /// x [..., hidden] → the same shape.
  mx::array operator()(const mx::array& x) const;

 private:
  struct Stacks {
    std::once_flag made;
    std::optional<MatrixStack> gate, up, down;
  };

  mx::array by_mlx(const mx::array& x, const mx::array& chosen, const mx::array& weights) const;

  Linear router_;
  std::shared_ptr<const std::vector<Expert>> experts_;
  ExpertsConfig config_;
  Activation activation_;
  std::shared_ptr<Stacks> stacks_;
};

}  // namespace veloxquant
