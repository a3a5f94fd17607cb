#include "veloxquant/plan/distortion_curve.h"

#include <algorithm>
#include <cmath>

#include "veloxquant/core/error.h"
#include "veloxquant/core/random.h"
#include "veloxquant/quantize/distortion.h"

namespace veloxquant {
namespace {

// A relative distortion so small that its logarithm would carry nothing but rounding; a quantizer that is exact has one.
constexpr double kLeastDistortion = 1e-12;

std::vector<double> checked_rates(const std::vector<double>& bit_rates) {
  std::vector<double> rates = bit_rates;
  std::sort(rates.begin(), rates.end());
  for (const double rate : rates)
    if (!(rate > 0) || !std::isfinite(rate))
      throw_invalid("fit_distortion_curve", "bit_rates: expected numbers above 0, got {}", rate);
  rates.erase(std::unique(rates.begin(), rates.end()), rates.end());
  if (rates.size() < 2)
    throw_invalid("fit_distortion_curve", "bit_rates: expected at least two different rates, got {}", rates.size());
  return rates;
}

// The quantizer's distortion on Gaussian vectors, for results that carry no measurement.
std::vector<DistortionPoint> gaussian_distortions(const std::string& quantizer, const std::vector<double>& rates) {
  constexpr int kDim = 128;
  constexpr std::size_t kTokens = 512;
  Random random(0);
  std::vector<float> vectors(kTokens * kDim);
  for (auto& value : vectors) value = static_cast<float>(random.normal());
  std::vector<DistortionPoint> points;
  for (const double rate : rates) {
    const auto measure = [&](Side side) {
      return relative_distortions(quantizer_method(quantizer), side, vectors, kTokens, kDim, {rate}, 0)[0];
    };
    points.push_back({rate, measure(Side::kKeys), measure(Side::kValues)});
  }
  return points;
}

double log_distortion(const DistortionPoint& point) {
  return std::log(std::max((point.keys + point.values) / 2, kLeastDistortion));
}

double log_distortion_at(const std::vector<DistortionPoint>& points, double rate, const std::string& layer) {
  if (rate < points.front().rate || rate > points.back().rate)
    throw_invalid("fit_distortion_curve", "{}: distortions were measured from {} to {} bits, got a rate of {}", layer,
                  points.front().rate, points.back().rate, rate);
  const auto above =
      std::lower_bound(points.begin(), points.end(), rate, [](const DistortionPoint& point, double r) { return point.rate < r; });
  if (above->rate == rate) return log_distortion(*above);
  const auto below = above - 1;
  const double share = (rate - below->rate) / (above->rate - below->rate);
  return (1 - share) * log_distortion(*below) + share * log_distortion(*above);
}

// A layer that stores nothing but zeros loses nothing at any rate, which says as little of the quantizer as no measurement.
bool loses_anything(const std::vector<DistortionPoint>& points) {
  return std::any_of(points.begin(), points.end(),
                     [](const DistortionPoint& point) { return point.keys != 0 || point.values != 0; });
}

// Least squares of log d = intercept − beta · rate.
DistortionCurve fit_line(const std::vector<double>& rates, const std::vector<double>& logs) {
  const auto n = static_cast<double>(rates.size());
  double mean_rate = 0, mean_log = 0, rate_rate = 0, rate_log = 0, log_log = 0;
  for (std::size_t i = 0; i < rates.size(); ++i) mean_rate += rates[i] / n, mean_log += logs[i] / n;
  for (std::size_t i = 0; i < rates.size(); ++i) {
    rate_rate += (rates[i] - mean_rate) * (rates[i] - mean_rate);
    rate_log += (rates[i] - mean_rate) * (logs[i] - mean_log);
    log_log += (logs[i] - mean_log) * (logs[i] - mean_log);
  }
  const double slope = rate_log / rate_rate;
  return {.layer_name = {},
          .alpha = std::exp(mean_log - slope * mean_rate),
          .beta = -slope,
          .r_squared = log_log > 0 ? slope * rate_log / log_log : 1.0};
}

double squared_sensitivity(const SensitivityResult& result) {
  for (const double value : {result.mean_sensitivity, result.std_sensitivity})
    if (!(value >= 0) || !std::isfinite(value))
      throw_invalid("fit_distortion_curve", "{}: sensitivities: expected numbers from 0, got {}", result.layer_name, value);
  return result.mean_sensitivity * result.mean_sensitivity + result.std_sensitivity * result.std_sensitivity;
}

}  // namespace

double DistortionCurve::operator()(double rate) const {
  return alpha * std::exp(-beta * rate);
}

LayerMap<DistortionCurve> fit_distortion_curve(const LayerMap<SensitivityResult>& sensitivities,
                                               const std::vector<double>& bit_rates, const std::string& quantizer) {
  const auto rates = checked_rates(bit_rates);
  if (sensitivities.empty()) throw_invalid("fit_distortion_curve", "expected at least one layer, got none");
  quantizer_method(quantizer);
  std::vector<DistortionPoint> gaussian;
  LayerMap<DistortionCurve> curves;
  for (const auto& [name, result] : sensitivities) {
    const auto measured = result.distortions.find(quantizer);
    const bool has_points = measured != result.distortions.end() && loses_anything(measured->second);
    if (!has_points && gaussian.empty()) gaussian = gaussian_distortions(quantizer, rates);
    const auto& points = has_points ? measured->second : gaussian;
    std::vector<double> logs;
    for (const double rate : rates) logs.push_back(log_distortion_at(points, rate, name));
    DistortionCurve curve = fit_line(rates, logs);
    if (!(curve.beta > 0))
      throw_invalid("fit_distortion_curve", "{}: the distortion of {} does not fall with the rate (beta {:.3g})", name, quantizer,
                    curve.beta);
    curve.layer_name = name;
    curve.alpha *= squared_sensitivity(result) / 2;
    if (!std::isfinite(curve.alpha))
      throw_invalid("fit_distortion_curve", "{}: sensitivity and distortions are too large for a curve", name);
    curves.emplace(name, std::move(curve));
  }
  return curves;
}

}  // namespace veloxquant
