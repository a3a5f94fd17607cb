// What scores of many positions say together, and how well windows of text determine it.
#pragma once

#include <cstddef>
#include <optional>
#include <span>
#include <vector>

namespace veloxquant {

/// What one storage scored in one window.
struct WindowScores {
  std::vector<float> kl;       // of each position, nats
  double kl_variance = 0;      // of their sum, where it is an estimate (SavedLogits)
  std::size_t agreements = 0;  // positions whose likeliest token is that of full precision
  double cross_entropy = 0;    // sum of −log p̃ of the tokens that follow, nats
  std::size_t targets = 0;     // tokens that follow
};

/// Statistics over all positions of all windows.  A quantile q of n positions is the ⌈q·n⌉-th smallest, so that 99.9 % of a few
/// positions is their maximum.
struct Measures {
  double perplexity = 0;         // exp of the mean cross-entropy of all tokens that follow
  double perplexity_change = 0;  // less that of full precision
  double kl_mean = 0;            // KL(p ‖ p̃) against full precision, nats a token
  double kl_median = 0;
  double kl_p99 = 0;
  double kl_p999 = 0;
  double kl_max = 0;
  double top1 = 0;  // share of positions whose likeliest token is that of full precision
};

/// Statistics of all windows, and of all but one.
struct WindowStatistics {
  Measures all;
  std::vector<Measures> without;  // [windows]: without window w; none of a single one
};

/// `scores` and `full`, of full precision: of the same windows, at least one, each with a position and a target.
WindowStatistics window_statistics(std::span<const WindowScores> scores, std::span<const WindowScores> full);

/// Standard errors by the jackknife over W windows: √((W − 1)/W · Σ_w (θ_w − θ̄)²), θ_w being the statistic without window w (Efron
/// and Stein 1981).  Neighbouring positions depend on each other, windows hardly do, so that what varies is the text of windows. Of
/// a mean over windows of one length that is s/√W.  Quantiles are those of the positions that stay, so that a window is a large
/// group to leave out, as they need (Shao and Wu 1989).  Of the maximum it is no error, but (W − 1)/W of what it falls without its
/// window.  None for a single window.
std::optional<Measures> standard_error(const WindowStatistics& statistics);

/// What a storage measures less what another one does.
struct PairedDifference {
  Measures value;
  std::optional<Measures> error;  // of the difference: what both lose of a hard window cancels
};

/// Of two storages over the same windows.
PairedDifference paired_difference(const WindowStatistics& a, const WindowStatistics& b);

}  // namespace veloxquant
