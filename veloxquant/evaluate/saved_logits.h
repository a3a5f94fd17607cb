// Full precision's next-token distributions in a file, so that they are computed once for any number of evaluations.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include "mlx/array.h"
#include "veloxquant/model/divergence.h"
#include "veloxquant/model/language_model.h"
#include "veloxquant/text/samples.h"

namespace veloxquant {

/// What is kept of each distribution p: the likeliest tokens, and as many drawn from the others.
inline constexpr int kSavedTop = 128, kSavedDrawn = 32;

/// p at the positions from score_from on of all windows, P positions in all, 1.3 KB each.
///
/// KL(p ‖ p̃) = Σ p·f(d) with d = log p − log p̃ and f(d) = e^−d − 1 + d ≥ 0, since both sum to 1.  The likeliest tokens T, and what
/// the others R have together, are known: Σ_T p·f(d) + r·f(d_R), with r = Σ_R p, is never more than KL (by the log-sum inequality),
/// and less by r·KL(p ‖ p̃ within R).  That is estimated from tokens drawn within R by p: r · mean f(d − d_R), at least 0, and KL in
/// expectation.  So a KL averaged over positions is known to within what kl_variance says, some 10⁻³ of it over thousands of
/// positions; that of one position by r times about a quarter of its share within R.  Estimates fall short, by r at most, where a
/// storage gives much to single tokens of R that p all but excludes.  Perplexity and agreement are exact.
struct SavedLogits {
  std::string source = "full precision";  // in messages: the file
  std::string model;                      // for people, what ModelIdentity says
  std::string text;                       // SHA-256, in hex, of the windows' tokens
  int windows = 0, length = 0, score_from = 0;
  std::vector<float> probe = {};  // [vocab_size]: logits of a few tokens, since a model's identity says nothing of its weights
  int top = 0, drawn = 0;         // kSavedTop, or all tokens but one where there are fewer; kSavedDrawn
  std::vector<std::int32_t> tokens = {};      // [P, top + drawn]: the likeliest, in order, and those drawn
  std::vector<float> log_probabilities = {};  // [P, top + drawn], of p
  std::vector<float> log_rest = {};           // [P]: log r
  std::vector<float> cross_entropy = {};      // [P]: −log p(token that follows), 0 at the last position of a window

  int positions() const { return length - score_from; }                                                 // of a window
  std::size_t each() const { return static_cast<std::size_t>(top) + static_cast<std::size_t>(drawn); }  // tokens of a position
};

/// With no window yet.
SavedLogits start_logits(const LanguageModel& model, const TokenBatch& windows, int score_from);

/// Adds the next window: hidden states [1, positions, hidden_size] after the last layer; targets as score_hidden() takes them.
/// What is drawn depends on window and position alone.
void add_window(const LanguageModel& model, const mx::array& hidden, std::span<const std::int32_t> targets, SavedLogits& logits);

/// Throws std::runtime_error that names what differs unless `logits` are of this model, these windows and positions from score_from
/// (or an earlier one) on.
void check_logits(const SavedLogits& logits, const LanguageModel& model, const TokenBatch& windows, int score_from);

/// What score_hidden() says of full precision against itself, from `score_from` on.
std::vector<PositionScore> reference_scores(const SavedLogits& logits, int window, int score_from);

struct SavedScores {
  std::vector<PositionScore> scores;
  double kl_variance = 0;  // of the sum of their KL, by what was drawn
};

/// Scores hidden states [1, T, hidden_size] of the positions of a window from `score_from` on.
SavedScores score_saved(const LanguageModel& model, const SavedLogits& logits, int window, int score_from, const mx::array& hidden,
                        std::span<const std::int32_t> targets);

/// Writes a safetensors file atomically: same logits, same bytes.
void write_logits(const SavedLogits& logits, const std::filesystem::path& path);

/// Reads it strictly.  Throws std::runtime_error that names the file and what is wrong: damage, another version, tensors that are
/// missing or of the wrong type or shape.
SavedLogits read_logits(const std::filesystem::path& path);

}  // namespace veloxquant
