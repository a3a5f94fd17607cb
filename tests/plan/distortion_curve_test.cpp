#include "veloxquant/plan/distortion_curve.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <stdexcept>

#include "tests/temporary_folder.h"

namespace veloxquant {
namespace {

using ::testing::HasSubstr;
using testing::message_of;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
const std::vector<double> kRates = {1.0, 1.5, 2.0, 3.0, 4.0};

// Keys and values lie on exponentials with the same decay, so that their mean does too.
SensitivityResult exponential(int layer, double mean, double deviation, double keys, double values, double beta) {
  SensitivityResult result{
      .layer_name = layer_name(layer), .mean_sensitivity = mean, .std_sensitivity = deviation, .distortions = {}};
  for (const double rate : {1.0, 2.0, 3.0, 4.0})
    result.distortions["turboquant"].push_back({rate, keys * std::exp(-beta * rate), values * std::exp(-beta * rate)});
  return result;
}

LayerMap<SensitivityResult> one(SensitivityResult result) {
  return {{result.layer_name, std::move(result)}};
}

std::string problem(const LayerMap<SensitivityResult>& sensitivities, const std::vector<double>& rates = kRates,
                    const std::string& quantizer = "turboquant") {
  return message_of<std::invalid_argument>([&] { fit_distortion_curve(sensitivities, rates, quantizer); });
}

TEST(DistortionCurve, RecoversAnExponential) {
  const auto curves = fit_distortion_curve(
      {{"layer_2", exponential(2, 3.0, 0.5, 1.2, 0.8, 1.4)}, {"layer_10", exponential(10, 0.1, 0.0, 2.0, 4.0, 0.9)}});
  ASSERT_EQ(curves.size(), 2u);
  const auto& curve = curves.at("layer_2");
  EXPECT_EQ(curve.layer_name, "layer_2");
  EXPECT_NEAR(curve.beta, 1.4, 1e-12);
  EXPECT_NEAR(curve.alpha, 0.5 * (9 + 0.25) * 1.0, 1e-10);
  EXPECT_NEAR(curve.r_squared, 1.0, 1e-12);
  EXPECT_NEAR(curve(2.5), curve.alpha * std::exp(-1.4 * 2.5), 1e-12);
  EXPECT_NEAR(curves.at("layer_10").alpha, 0.5 * 0.01 * 3.0, 1e-12);
  EXPECT_EQ(curves.begin()->first, "layer_2");
}

// The line of least squares through logarithms 0, −1, −3 at rates 1, 2, 3: slope −3/2, mean −4/3.
TEST(DistortionCurve, IsTheLeastSquaresLineOfLogarithms) {
  SensitivityResult result{.layer_name = "layer_0", .mean_sensitivity = std::sqrt(2), .std_sensitivity = 0, .distortions = {}};
  for (const auto& [rate, log] : {std::pair(1.0, 0.0), {2.0, -1.0}, {3.0, -3.0}})
    result.distortions["kivi"].push_back({rate, 2 * std::exp(log), 0});
  const auto curve = fit_distortion_curve(one(result), {1, 2, 3}, "kivi").at("layer_0");
  EXPECT_NEAR(curve.beta, 1.5, 1e-12);
  EXPECT_NEAR(std::log(curve.alpha), -4.0 / 3 + 1.5 * 2, 1e-12);
  EXPECT_NEAR(curve.r_squared, 4.5 / (14.0 / 3), 1e-12);
}

TEST(DistortionCurve, RatesBetweenMeasuredOnesAreInterpolatedInLogarithms) {
  const auto result = one(exponential(0, 1, 0, 1, 1, 1.3));
  EXPECT_NEAR(fit_distortion_curve(result, {1.25, 1.5, 3.75}).at("layer_0").beta, 1.3, 1e-12);
  EXPECT_THAT(problem(result, {1, 5}), HasSubstr("from 1 to 4"));
  EXPECT_THAT(problem(result, {0.5, 2}), HasSubstr("0.5"));
}

// At high rate every further bit divides the distortion of a scalar quantizer by four: β near ln 4; at 1 to 4 bits Lloyd–Max on a
// Gaussian has 0.3634, 0.1175, 0.03454, 0.009497 (Max 1960).
TEST(DistortionCurve, WithoutMeasurementsTheGaussianIsTaken) {
  const SensitivityResult by_hand{
      .layer_name = "layer_0", .mean_sensitivity = std::sqrt(2), .std_sensitivity = 0, .distortions = {}};
  const auto curve = fit_distortion_curve(one(by_hand), {1, 2, 3, 4}).at("layer_0");
  const double logs[] = {std::log(0.3634), std::log(0.1175), std::log(0.03454), std::log(0.009497)};
  const double slope = (-1.5 * logs[0] - 0.5 * logs[1] + 0.5 * logs[2] + 1.5 * logs[3]) / 5;
  EXPECT_NEAR(curve.beta, -slope, 0.02);
  EXPECT_NEAR(curve(1), 0.3634, 0.03);
  EXPECT_GT(curve.r_squared, 0.99);
  for (const char* quantizer : {"kivi", "affine"})
    EXPECT_GT(fit_distortion_curve(one(by_hand), kRates, quantizer).at("layer_0").beta, 0) << quantizer;
}

TEST(DistortionCurve, InsensitiveAndEmptyLayersHaveNoCostButADecay) {
  const auto insensitive = fit_distortion_curve(one(exponential(0, 0, 0, 1, 1, 1.2))).at("layer_0");
  EXPECT_EQ(insensitive.alpha, 0);
  EXPECT_NEAR(insensitive.beta, 1.2, 1e-12);
  EXPECT_EQ(insensitive(1), 0);

  const auto zeros = fit_distortion_curve(one(exponential(0, 0, 0, 0, 0, 1))).at("layer_0");
  EXPECT_EQ(zeros.alpha, 0);
  EXPECT_GT(zeros.beta, 0);
}

TEST(DistortionCurve, RefusesCurvesThatDoNotFall) {
  EXPECT_THAT(problem(one(exponential(7, 1, 0, 1, 1, -0.1))), HasSubstr("layer_7"));
  EXPECT_THAT(problem(one(exponential(7, 1, 0, 1, 1, 0))), HasSubstr("layer_7"));
}

TEST(DistortionCurve, RefusesWhatItCannotUse) {
  const auto good = one(exponential(0, 1, 0, 1, 1, 1));
  EXPECT_FALSE(problem({}).empty());
  EXPECT_THAT(problem(good, {}), HasSubstr("at least two"));
  EXPECT_THAT(problem(good, {2}), HasSubstr("at least two"));
  EXPECT_THAT(problem(good, {2, 2}), HasSubstr("at least two"));
  for (const double rate : {0.0, -1.0, kNaN, std::numeric_limits<double>::infinity()})
    EXPECT_THAT(problem(good, {1, 2, rate}), HasSubstr("bit_rates")) << rate;
  EXPECT_THAT(problem(good, kRates, "gguf"), HasSubstr("turboquant"));
  for (const double value : {-1.0, kNaN, std::numeric_limits<double>::infinity(), 1e200}) {
    EXPECT_THAT(problem(one(exponential(3, value, 0, 1, 1, 1))), HasSubstr("layer_3")) << value;
    EXPECT_THAT(problem(one(exponential(3, 0, value, 1, 1, 1))), HasSubstr("layer_3")) << value;
  }
  EXPECT_THAT(problem(one(exponential(3, 1, 0, kNaN, 1, 1))), HasSubstr("layer_3"));
}

}  // namespace
}  // namespace veloxquant
