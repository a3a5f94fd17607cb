// Distortion as a function of rate, fitted per layer.
#pragma once

#include <string>
#include <vector>

#include "veloxquant/plan/layer_map.h"
#include "veloxquant/plan/sensitivity.h"

namespace veloxquant {

/// D(r) = alpha · e^(−beta · r): predicted KL, in nats, of storing the layer at r bits of codes an element.
struct DistortionCurve {
  std::string layer_name;
  double alpha = 0;      // carries the layer's sensitivity; 0 for a layer that does not mind noise
  double beta = 0;       // positive
  double r_squared = 1;  // share of the variance of log D over the rates that the line explains

  double operator()(double rate) const;

  bool operator==(const DistortionCurve&) const = default;
};

/// Fits each layer's curve by least squares of log D at `bit_rates`, where D = ½·(mean² + std²)·d and d is the mean of the relative
/// distortions of its keys and its values by `quantizer`, as measured with the sensitivities; between measured rates log d is
/// interpolated.  A layer without measured distortions, or whose data is all zero, is given the quantizer's on a Gaussian.
/// RateQuant (arXiv 2605.06675) writes α·β'^(−r); β = ln β'.
///
/// Throws std::invalid_argument for no layers, fewer than two different rates, rates outside what was measured (says the range), an
/// unknown quantizer, sensitivities that are negative or not finite, and a layer whose distortion does not fall with the rate
/// (names it).
LayerMap<DistortionCurve> fit_distortion_curve(const LayerMap<SensitivityResult>& sensitivities,
                                               const std::vector<double>& bit_rates = {1.0, 1.5, 2.0, 3.0, 4.0},
                                               const std::string& quantizer = "turboquant");

}  // namespace veloxquant
