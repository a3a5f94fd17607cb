// How far next-token distributions lie apart.
#pragma once

#include <span>
#include <vector>

#include "mlx/array.h"
#include "veloxquant/model/language_model.h"

namespace veloxquant {

/// What one position says of a distribution p̃ next to the reference p.
struct PositionScore {
  float kl;             // KL(p ‖ p̃), nats
  float cross_entropy;  // −log p̃(target), nats; 0 where there is no target
  int top;              // argmax of p̃, the lowest of equal ones
};

/// Scores hidden states of one sequence after the last layer, each [1, T, hidden_size]; the first is the reference and is scored
/// against itself.  `targets`: the token that follows each position, −1 for none; or empty.  Logits exist for a few hundred
/// positions at a time only.  → [hidden.size()][T].
std::vector<std::vector<PositionScore>> score_hidden(const LanguageModel& model, const std::vector<mx::array>& hidden,
                                                     std::span<const std::int32_t> targets);

}  // namespace veloxquant
