#include "veloxquant/calibrate/sensitivity.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "tests/model/demo_model.h"
#include "tests/temporary_folder.h"
#include "veloxquant/allocators/ratequant.h"
#include "veloxquant/calibrate/make_plan.h"
#include "veloxquant/calibrate/observe.h"
#include "veloxquant/core/parallel.h"
#include "veloxquant/quantize/distortion.h"

namespace veloxquant {
namespace {

using testing::demo_model;
using testing::demo_tokenizer;
using ::testing::HasSubstr;
using testing::message_of;

LayerMap<SensitivityResult> probe(double noise_scale, std::uint64_t seed, int samples = 4) {
  return probe_sensitivities(demo_model(), testing::text_samples(samples, 64),
                             {.noise_scale = noise_scale, .seed = seed, .quantizers = {"turboquant"}, .rates = {1, 2}});
}

TEST(Sensitivity, OneResultALayerInNumericOrder) {
  const auto results = probe(0.1, 1);
  ASSERT_EQ(results.size(), 12u);
  int layer = 0;
  for (const auto& [name, result] : results) {
    EXPECT_EQ(name, layer_name(layer++));
    EXPECT_EQ(result.layer_name, name);
    EXPECT_GT(result.mean_sensitivity, 0);
    EXPECT_GE(result.std_sensitivity, 0);
    EXPECT_EQ(result.distortions.at("turboquant").size(), 2u);
  }
}

// √(2·KL) is linear in small noise, so that the scale cancels.
TEST(Sensitivity, IsLinearInSmallNoise) {
  const auto small = probe(0.02, 1), large = probe(0.04, 1);
  for (const auto& [name, result] : small)
    EXPECT_NEAR(result.mean_sensitivity, large.at(name).mean_sensitivity, 0.1 * result.mean_sensitivity) << name;
}

TEST(Sensitivity, SameSeedSameResultOnAnyThreads) {
  const auto first = probe(0.1, 5, 2);
  EXPECT_EQ(first, probe(0.1, 5, 2));
  const int threads = num_threads();
  set_num_threads(1);
  const auto alone = probe(0.1, 5, 2);
  set_num_threads(threads);
  EXPECT_EQ(first, alone);
  EXPECT_NE(first, probe(0.1, 6, 2));
}

TEST(Sensitivity, DistortionsAreThoseOfTheQuantizer) {
  const auto samples = testing::text_samples(2, 64);
  const auto results = probe_sensitivities(demo_model(), samples, {.seed = 0, .quantizers = {"kivi"}, .rates = {2}});
  observe_layers(demo_model(), samples, [&](int layer, const LayerObservation& observation) {
    const auto& point = results.at(layer_name(layer)).distortions.at("kivi").at(0);
    for (const Side side : {Side::kKeys, Side::kValues}) {
      const auto vectors = observation.span(side);
      const auto quantizer = make_quantizer(quantizer_method("kivi").fit(vectors, 64, {.side = side, .width = 2}));
      EXPECT_NEAR(side == Side::kKeys ? point.keys : point.values, restored_distortion(*quantizer, vectors, 64), 1e-9);
    }
  });
}

TEST(Sensitivity, BadInput) {
  EXPECT_THROW(probe(0, 1), std::invalid_argument);
  EXPECT_THROW(probe(-0.1, 1), std::invalid_argument);
  EXPECT_THROW(probe(std::nan(""), 1), std::invalid_argument);
  const allocators::CalibrationOptions text{.texts = {testing::kText}, .seed = 0, .progress = {}};
  using allocators::ratequant::calibrate_layer_sensitivities;
  EXPECT_THROW(calibrate_layer_sensitivities(demo_model(), demo_tokenizer(), 1, 32, 0.1, "tpu", text), std::invalid_argument);
  EXPECT_THROW(calibrate_layer_sensitivities(demo_model(), demo_tokenizer(), 0, 32, 0.1, "cpu", text), std::invalid_argument);
  EXPECT_THROW(calibrate_layer_sensitivities(demo_model(), demo_tokenizer(), 32, 512, 0.1, "cpu", text),
               std::invalid_argument);  // too short
  EXPECT_THROW(calibrate_layer_sensitivities(demo_model(), demo_tokenizer(), 1, 4096, 0.1, "cpu", text), std::invalid_argument);
}

// Noise beyond float32 must not come out as a sensitivity that is no number.
TEST(Sensitivity, RefusesNoiseThatOverflows) {
  EXPECT_THAT(message_of<std::invalid_argument>([] { probe(1e300, 1, 1); }), HasSubstr("noise_scale: 1e+300"));
  EXPECT_THAT(message_of<std::runtime_error>([] { probe(1e37, 1, 1); }), HasSubstr("expected a finite change of the output"));
}

TEST(RateQuant, FromModelToBits) {
  const allocators::CalibrationOptions text{.texts = {testing::kText}, .seed = 0, .progress = {}};
  const auto sensitivities =
      allocators::ratequant::calibrate_layer_sensitivities(demo_model(), demo_tokenizer(), 2, 64, 0.1, "cpu", text);
  const auto curves = allocators::ratequant::fit_distortion_curve(sensitivities);
  const auto bits = allocators::ratequant::allocate_bits_ratequant(curves, 2.0);
  ASSERT_EQ(bits.size(), 12u);
  int sum = 0;
  for (const auto& [name, width] : bits) sum += width;
  EXPECT_EQ(sum, 24);
  for (const auto& [name, curve] : curves) {
    EXPECT_GT(curve.beta, 1.0) << name;  // TurboQuant loses a factor of 3 to 4 in each bit
    EXPECT_LT(curve.beta, 1.7) << name;
    EXPECT_GT(curve.r_squared, 0.95) << name;
  }
}

Plan plan_of(const std::string& method, double bits, Units units) {
  return make_plan(demo_model(), testing::text_samples(4, 64), {.method = method, .bits = bits, .units = units, .seed = 1});
}

TEST(MakePlan, KeepsTheBudget) {
  EXPECT_DOUBLE_EQ(effective_bits(plan_of("turboquant", 2.25, Units::kUniform)), 2.25);
  EXPECT_DOUBLE_EQ(effective_bits(plan_of("kivi", 3.0, Units::kUniform)), 3.0);
  for (const char* method : {"turboquant", "affine", "kivi"}) {
    const Plan plan = plan_of(method, 2.8, Units::kLayer);
    EXPECT_LE(effective_bits(plan), 2.8) << method;
    EXPECT_GE(effective_bits(plan), 2.8 - 1.0 / 12 - 1e-9) << method;  // one layer's bit at most is left
    ASSERT_TRUE(plan.predicted_kl.has_value());
    EXPECT_GT(*plan.predicted_kl, 0);
  }
}

TEST(MakePlan, LayersThatMindNoiseGetNoFewerBits) {
  const auto samples = testing::text_samples(4, 64);
  const auto sensitivities = probe_sensitivities(demo_model(), samples, {.seed = 1, .quantizers = {}, .rates = {}});
  const Plan plan = plan_of("turboquant", 2.25, Units::kLayer);
  const auto bits = [&](const std::string& name) {
    return plan.units[static_cast<std::size_t>(2 * layer_index(name))].quantizer.numbers.at("bits");
  };
  const auto compare = [&](const auto& a, const auto& b) { return a.second.mean_sensitivity < b.second.mean_sensitivity; };
  const auto [least, most] = std::minmax_element(sensitivities.begin(), sensitivities.end(), compare);
  EXPECT_GT(bits(most->first), bits(least->first));
}

TEST(MakePlan, VecInferUniformAndPerLayer) {
  const Plan uniform = plan_of("vecinfer", 1.0, Units::kUniform);
  EXPECT_DOUBLE_EQ(effective_bits(uniform), 1.0);
  EXPECT_EQ(uniform.units[0].quantizer.tensors.at("codebook").shape, (std::vector<std::int64_t>{8, 256, 8}));
  const Plan mixed = plan_of("vecinfer", 1.5, Units::kLayer);
  EXPECT_LE(effective_bits(mixed), 1.5);
  EXPECT_GE(effective_bits(mixed), 1.5 - 1.0 / 12 - 1e-9);
}

TEST(MakePlan, SameSeedSamePlan) {
  EXPECT_EQ(plan_of("vecinfer", 1.0, Units::kUniform), plan_of("vecinfer", 1.0, Units::kUniform));
}

// What lies between the widths of a layer and those of a whole model is refused, not given in fewer bits than asked for.
TEST(MakePlan, SaysTheTrueRangeOfAWidthPerLayer) {
  const struct {
    const char *method, *range;
  } cases[] = {
      {"turboquant", "1.25 to 4.25 bits"}, {"kivi", "2 to 5 bits"}, {"affine", "1.5 to 4.5 bits"}, {"vecinfer", "0.125 to 4 bits"}};
  for (const auto& [method, range] : cases) {
    const PlanOptions options{.method = method, .bits = 6, .units = Units::kLayer};
    EXPECT_THAT(message_of<std::invalid_argument>([&] { check_plan_options(demo_model().config(), options, 4, 64); }),
                HasSubstr(range));
    EXPECT_EQ(message_of<std::invalid_argument>(
                  [&] { check_plan_options(demo_model().config(), {.method = method, .bits = 4, .units = Units::kLayer}, 4, 64); }),
              "");
  }
}

TEST(MakePlan, OptionsAreCheckedWithoutSamples) {
  const auto problem = [](const PlanOptions& options, int num_samples = 4, int length = 64) {
    return message_of<std::invalid_argument>([&] { check_plan_options(demo_model().config(), options, num_samples, length); });
  };
  EXPECT_EQ(problem({.method = "vecinfer", .bits = 2}), "");
  EXPECT_THAT(problem({.method = "vecinfer", .bits = 99}), HasSubstr("got 99"));
  EXPECT_THAT(problem({.method = "vecinfer", .bits = 1.5}), HasSubstr("sub-spaces"));
  EXPECT_THAT(problem({.method = "vecinfer", .bits = 2}, 1, 64), HasSubstr("needs at least 256 vectors"));
  EXPECT_EQ(problem({.method = "kivi", .bits = 3}, 1, 1), "");
  EXPECT_THAT(problem({.method = "kivi", .bits = 3, .units = Units::kHead}),
              HasSubstr("units: kivi offers uniform and layer, got head"));
  ModelConfig odd = demo_model().config();
  odd.head_dim = 24;
  EXPECT_THAT(message_of<std::invalid_argument>([&] { check_plan_options(odd, {.method = "vecinfer"}, 4, 64); }),
              HasSubstr("head_dim: expected a power of two, got 24"));
}

TEST(MakePlan, SaysWhatWasRead) {
  const PlanOptions uniform{.method = "kivi", .bits = 3, .units = Units::kUniform, .context = 1000};
  EXPECT_FALSE(reads_samples(uniform));
  const Provenance blind = make_plan(demo_model(), TokenBatch(0, 0), uniform).provenance;
  EXPECT_EQ(blind.num_samples, 0);
  EXPECT_EQ(blind.sequence_length, 0);
  EXPECT_EQ(blind.context, 1000);
  EXPECT_TRUE(reads_samples({.method = "kivi", .units = Units::kLayer}));
  const Provenance read = plan_of("vecinfer", 0.25, Units::kUniform).provenance;
  EXPECT_EQ(read.num_samples, 4);
  EXPECT_EQ(read.sequence_length, 64);
  EXPECT_EQ(read.context, demo_model().config().max_position_embeddings);
}

TEST(MakePlan, BadInput) {
  EXPECT_THROW(plan_of("turboquant", 1.0, Units::kUniform), std::invalid_argument);  // below a bit and a norm
  EXPECT_THROW(plan_of("turboquant", 99.0, Units::kUniform), std::invalid_argument);
  EXPECT_THROW(plan_of("vecinfer", 1.5, Units::kUniform), std::invalid_argument);  // 12 sub-spaces do not divide 64
  EXPECT_THROW(plan_of("gguf", 2.0, Units::kUniform), std::invalid_argument);
  // 2 heads × 64 tokens are fewer than 256 centroids.
  EXPECT_THROW(make_plan(demo_model(), testing::text_samples(1, 64),
                         {.method = "vecinfer", .bits = 2.0, .units = Units::kUniform, .seed = 1}),
               std::invalid_argument);
}

}  // namespace
}  // namespace veloxquant
