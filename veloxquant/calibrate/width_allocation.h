// Codes and patches for every unit of a model, within a budget.
#pragma once

#include <cstdint>
#include <vector>

#include "veloxquant/calibrate/adjoint_costs.h"
#include "veloxquant/calibrate/make_plan.h"
#include "veloxquant/model/config.h"
#include "veloxquant/plan/allocation.h"

namespace veloxquant {

/// A unit of a model and what it costs at every width.
struct MeasuredUnit {
  int layer, head;
  Side side;
  CostLadder ladder;
};

struct Width {
  int codes, patches;

  bool operator==(const Width&) const = default;
};

/// Predicted KL, in nats a token, at some effective bits.
struct FrontierPoint {
  double bits, predicted_kl;
};

/// Least and most bytes that keys and values of `context` tokens can take in so many layers, of which `exact_tokens` are window and
/// sinks.
struct ByteRange {
  std::int64_t least, most;
};
ByteRange possible_bytes(const ModelConfig& config, std::size_t layers, int context, int exact_tokens);

/// What is given out: bytes of one sequence of `context` tokens, of which window and sinks take theirs first.
class WidthAllocation {
 public:
  /// context > exact_tokens (window and sinks together); every layer, side and head once, in any order.
  WidthAllocation(const ModelConfig& config, const std::vector<MeasuredUnit>& units, Units kind, int context, int exact_tokens);

  double bits_of(std::int64_t bytes) const;
  std::int64_t bytes_of(double bits) const;

  /// The widths of least total predicted cost that take at most `bytes`, in the order of the units.  Throws std::invalid_argument
  /// for fewer bytes than possible.
  std::vector<Width> solve(std::int64_t bytes) const;

  /// The lower convex hull of predicted KL over effective bits, ascending in bits.
  std::vector<FrontierPoint> frontier() const;

 private:
  std::vector<std::vector<std::size_t>> groups_;  // units that share a width
  std::size_t num_units_;
  std::vector<std::vector<AllocationOption>> options_;  // [groups]
  std::vector<std::vector<Width>> widths_;
  std::int64_t exact_bytes_ = 0;
  double elements_ = 0;
};

}  // namespace veloxquant
