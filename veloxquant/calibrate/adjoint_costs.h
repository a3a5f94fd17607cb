// What storing a unit at a width costs the model, predicted from its gradients.
#pragma once

#include <cstdint>
#include <vector>

#include "veloxquant/calibrate/unit_statistics.h"
#include "veloxquant/quantize/rotated_pq.h"

namespace veloxquant {

/// Numbers of patches that allocation chooses from, of each 256 tokens.
inline constexpr int kPatchCounts[] = {0, 1, 2, 4, 8, 16};

/// Numbers of codes at which costs are measured, ascending: 0.25 to 4 bits an element.
std::vector<int> ladder_codes(int head_dim);

/// ½·E[(gᵀe)²] of a unit whose held-out rows are stored by `quantizer` and of which the worst `patches` of each 256, by the metric,
/// are patched: nats a token, over the rows of the first `samples_counted` samples.
double predicted_cost(const UnitStatistics& unit, const QuantizerParameters& quantizer, int patches, int samples_counted);

/// Codebooks of one stage by few iterations on few rows: good enough to tell units and widths apart.
QuantizerParameters quick_fit(const UnitStatistics& unit, Rotation rotation, int codes, std::uint64_t seed);

/// Predicted cost over numbers of codes and patches.
class CostLadder {
 public:
  /// Measures the unit at a few numbers of codes with quickly fitted codebooks; between them log cost is interpolated.
  CostLadder(const UnitStatistics& unit, Rotation rotation, std::uint64_t seed);

  int least_codes() const { return codes_.front(); }
  int most_codes() const { return codes_.back(); }

  /// least_codes() ≤ codes ≤ most_codes(), patches one of kPatchCounts → nats a token.  Never rises with codes or patches.
  double cost(int codes, int patches) const;

  /// Multiplies all costs.
  void scale(double factor);

 private:
  std::vector<int> codes_;
  std::vector<std::vector<double>> costs_;  // [codes_, kPatchCounts]
};

}  // namespace veloxquant
