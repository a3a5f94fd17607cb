#include "veloxquant/allocators/vecinfer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <limits>
#include <numeric>

#include "tests/model/demo_model.h"
#include "tests/temporary_folder.h"
#include "veloxquant/calibrate/make_plan.h"
#include "veloxquant/calibrate/observe.h"
#include "veloxquant/core/random.h"
#include "veloxquant/plan/plan_file.h"

namespace veloxquant {
namespace {

using namespace allocators::vecinfer;
using testing::demo_model;
using testing::demo_tokenizer;
using ::testing::HasSubstr;

const allocators::CalibrationOptions kOptions{.texts = {testing::kText}, .seed = 0, .progress = {}};

Tensor random_tensor(std::vector<std::int64_t> shape, std::uint64_t seed) {
  const auto size = std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>());
  Random random(seed);
  Tensor tensor{std::move(shape), {}};
  for (std::int64_t i = 0; i < size; ++i) tensor.values.push_back(static_cast<float>(random.normal()));
  return tensor;
}

double dot(const float* a, const float* b, std::size_t n) {
  double sum = 0;
  for (std::size_t i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * b[i];
  return sum;
}

TEST(VecInfer, SmoothFactorsAreRootsOfTheLargestKeys) {
  const Tensor factors = calibrate_smooth_factors(demo_model(), demo_tokenizer(), 3, 64, kOptions);
  ASSERT_EQ(factors.shape, (std::vector<std::int64_t>{12, 64}));
  observe_layers(demo_model(), testing::text_samples(3, 64), [&](int layer, const LayerObservation& observation) {
    std::vector<float> largest(64, 0.0f);
    const auto keys = observation.span(Side::kKeys);
    for (std::size_t i = 0; i < keys.size(); ++i) largest[i % 64] = std::max(largest[i % 64], std::abs(keys[i]));
    for (std::size_t i = 0; i < 64; ++i)
      EXPECT_FLOAT_EQ(factors.values[static_cast<std::size_t>(layer) * 64 + i], std::sqrt(largest[i]));
  });
}

TEST(VecInfer, CodebookInItsDocumentedShape) {
  const Tensor factors = calibrate_smooth_factors(demo_model(), demo_tokenizer(), 2, 64, kOptions);
  for (const auto& [centroids, subspaces] : {std::pair{2, 64}, std::pair{16, 8}, std::pair{128, 1}, std::pair{64, 4}}) {
    const Tensor codebook = train_codebook(demo_model(), demo_tokenizer(), factors, 2, centroids, subspaces, 64, 5, kOptions);
    EXPECT_EQ(codebook.shape, (std::vector<std::int64_t>{12, subspaces, centroids, 64 / subspaces}));
  }
}

TEST(VecInfer, BadCodebookOptions) {
  const Tensor factors{{12, 64}, std::vector<float>(12 * 64, 1.0f)};
  const auto train = [&](int centroids, int subspaces, int iterations, const Tensor& with) {
    return train_codebook(demo_model(), demo_tokenizer(), with, 2, centroids, subspaces, 64, iterations, kOptions);
  };
  EXPECT_THROW(train(3, 8, 5, factors), std::invalid_argument);
  EXPECT_THROW(train(1, 8, 5, factors), std::invalid_argument);
  EXPECT_THROW(train(8192, 8, 5, factors), std::invalid_argument);
  EXPECT_THROW(train(512, 8, 5, factors), std::invalid_argument);  // more than the 256 keys
  EXPECT_THROW(train(16, 7, 5, factors), std::invalid_argument);
  EXPECT_THROW(train(16, 0, 5, factors), std::invalid_argument);
  EXPECT_THROW(train(16, 8, 0, factors), std::invalid_argument);
  EXPECT_THROW(train(16, 8, 5, Tensor{{64}, std::vector<float>(64, 1.0f)}), std::invalid_argument);
}

TEST(VecInfer, BadFactorsAreNamed) {
  const auto problem = [](const auto& call) { return testing::message_of<std::invalid_argument>(call); };
  const auto train = [&](const Tensor& factors) {
    return problem([&] { train_codebook(demo_model(), demo_tokenizer(), factors, 2, 16, 8, 64, 5, kOptions); });
  };
  EXPECT_THAT(train({{12, 64}, {}}), HasSubstr("smooth_factors: expected a shape [12, 64], got [12, 64] with 0 values"));
  const Tensor keys = random_tensor({2, 64}, 1);
  for (const float bad : {0.0f, -1.0f, std::nanf(""), std::numeric_limits<float>::infinity()}) {
    Tensor all{{12, 64}, std::vector<float>(12 * 64, 1.0f)}, layer{{64}, std::vector<float>(64, 1.0f)};
    all.values[700] = layer.values[63] = bad;
    EXPECT_THAT(train(all), HasSubstr("smooth_factors: expected finite values above 0")) << bad;
    EXPECT_THAT(problem([&] { apply_dual_transform_keys(keys, layer); }), HasSubstr("smooth_factors")) << bad;
    EXPECT_THAT(problem([&] { apply_dual_transform_queries(keys, layer); }), HasSubstr("smooth_factors")) << bad;
  }
  EXPECT_THAT(problem([&] { apply_dual_transform_keys(keys, {{64}, {1, 1}}); }), HasSubstr("got [64] with 2 values"));
  EXPECT_THAT(problem([&] { apply_dual_transform_keys(keys, {{0}, {}}); }), HasSubstr("smooth_factors"));
}

// Keys are smoothed by the same factors whether they are asked for or come in a plan.
TEST(VecInfer, PlanHoldsTheCalibratedFactors) {
  const Tensor factors = calibrate_smooth_factors(demo_model(), demo_tokenizer(), 4, 64, kOptions);
  const Plan plan =
      make_plan(demo_model(), testing::text_samples(4, 64), {.method = "vecinfer", .bits = 1, .units = Units::kUniform, .seed = 1});
  for (std::size_t layer = 0; layer < 12; ++layer) {
    const auto begin = factors.values.begin() + static_cast<std::ptrdiff_t>(layer * 64);
    const Tensor& stored = plan.units[2 * layer].quantizer.tensors.at("smooth_factors");
    EXPECT_EQ(stored, (Tensor{{64}, std::vector<float>(begin, begin + 64)})) << layer;
  }
}

TEST(VecInfer, HadamardIsItsOwnInverse) {
  for (const int d : {1, 2, 4, 64, 256}) {
    const Tensor h = walsh_hadamard_matrix(d);
    ASSERT_EQ(h.shape, (std::vector<std::int64_t>{d, d}));
    const auto n = static_cast<std::size_t>(d);
    for (std::size_t i = 0; i < n; ++i)
      for (std::size_t j = 0; j < n; ++j) EXPECT_NEAR(dot(&h.values[i * n], &h.values[j * n], n), i == j ? 1.0 : 0.0, 1e-6);
  }
  for (const int d : {-4, 0, 3, 96}) EXPECT_THROW(walsh_hadamard_matrix(d), std::invalid_argument) << d;
}

TEST(VecInfer, DualTransformIsThatOfTheMatrixAndKeepsInnerProducts) {
  Tensor factors = random_tensor({64}, 1);
  for (float& factor : factors.values) factor = 0.1f + std::abs(factor);
  const Tensor keys = random_tensor({2, 5, 64}, 2), queries = random_tensor({2, 5, 64}, 3), h = walsh_hadamard_matrix(64);
  const Tensor k = apply_dual_transform_keys(keys, factors), q = apply_dual_transform_queries(queries, factors);
  ASSERT_EQ(k.shape, keys.shape);
  for (std::size_t row = 0; row < 10; ++row) {
    const double before = dot(&queries.values[row * 64], &keys.values[row * 64], 64),
                 after = dot(&q.values[row * 64], &k.values[row * 64], 64);
    const double norms =
        std::sqrt(dot(&q.values[row * 64], &q.values[row * 64], 64) * dot(&k.values[row * 64], &k.values[row * 64], 64));
    EXPECT_NEAR(before, after, 1e-6 * norms);
    for (std::size_t j = 0; j < 64; ++j) {
      double expected = 0;
      for (std::size_t i = 0; i < 64; ++i)
        expected += static_cast<double>(keys.values[row * 64 + i]) / factors.values[i] * h.values[i * 64 + j];
      EXPECT_NEAR(k.values[row * 64 + j], expected, 1e-5 * (1 + std::abs(expected)));
    }
  }
  EXPECT_THROW(apply_dual_transform_keys(random_tensor({2, 32}, 1), factors), std::invalid_argument);
  EXPECT_THROW(apply_dual_transform_keys(keys, Tensor{{64}, std::vector<float>(64, 0.0f)}), std::invalid_argument);
}

// From a plan on disk: its λ and codebook with the documented functions give what its quantizer gives.
TEST(VecInfer, WrittenPlanAgreesWithTheFunctions) {
  const auto path = std::filesystem::temp_directory_path() / ("vecinfer_test." + std::to_string(::getpid()));
  const auto samples = testing::text_samples(4, 64);
  write_plan(make_plan(demo_model(), samples, {.method = "vecinfer", .bits = 2, .units = Units::kUniform, .seed = 1}), path);
  const Plan plan = read_plan(path);
  std::filesystem::remove(path);
  observe_layers(demo_model(), samples, [&](int layer, const LayerObservation& observation) {
    const auto& unit = plan.units[static_cast<std::size_t>(2 * layer)].quantizer;
    const Tensor &factors = unit.tensors.at("smooth_factors"), &codebook = unit.tensors.at("codebook");
    const auto span = observation.span(Side::kKeys).subspan(0, 20 * 64);
    const Tensor keys{{20, 64}, {span.begin(), span.end()}};
    const Codes codes = quantize_vq(apply_dual_transform_keys(keys, factors), codebook);
    EXPECT_EQ(codes.shape, (std::vector<std::int64_t>{20, 16}));
    EXPECT_EQ(codes.bytes.size(), 320u);
    EXPECT_TRUE(codes.words.empty());
    const Tensor restored = dequantize_vq(codes, codebook);

    std::vector<float> by_quantizer(keys.values.size());
    make_quantizer(unit)->restore(keys.values, by_quantizer);
    const Tensor queries = random_tensor({20, 64}, static_cast<std::uint64_t>(layer));
    const Tensor turned = apply_dual_transform_queries(queries, factors), tables = compute_query_lut(turned, codebook);
    ASSERT_EQ(tables.shape, (std::vector<std::int64_t>{20, 16, 256}));
    for (std::size_t row = 0; row < 20; ++row) {
      double by_tables = 0;
      for (std::size_t s = 0; s < 16; ++s) by_tables += tables.values[(row * 16 + s) * 256 + codes.bytes[row * 16 + s]];
      const double in_rotated_space = dot(&turned.values[row * 64], &restored.values[row * 64], 64);
      const double with_restored_key = dot(&queries.values[row * 64], &by_quantizer[row * 64], 64);
      const double size = std::sqrt(dot(&turned.values[row * 64], &turned.values[row * 64], 64) *
                                    dot(&restored.values[row * 64], &restored.values[row * 64], 64));
      EXPECT_NEAR(by_tables, in_rotated_space, 1e-5 * size);
      EXPECT_NEAR(by_tables, with_restored_key, 1e-5 * size);
    }
  });
}

TEST(VecInfer, WideCodesAndBadCodes) {
  const Tensor codebook = random_tensor({4, 512, 2}, 1), vectors = random_tensor({3, 8}, 2);
  Codes codes = quantize_vq(vectors, codebook);
  EXPECT_EQ(codes.words.size(), 12u);
  EXPECT_TRUE(codes.bytes.empty());
  EXPECT_EQ(dequantize_vq(codes, codebook).shape, vectors.shape);
  codes.words[5] = 512;
  EXPECT_THROW(dequantize_vq(codes, codebook), std::invalid_argument);
  EXPECT_THROW(quantize_vq(random_tensor({3, 7}, 2), codebook), std::invalid_argument);
  EXPECT_THROW(quantize_vq(vectors, random_tensor({4, 4}, 1)), std::invalid_argument);
  Tensor broken = vectors;
  broken.values[3] = std::nanf("");
  EXPECT_THROW(quantize_vq(broken, codebook), std::invalid_argument);
  EXPECT_THROW(compute_query_lut(broken, codebook), std::invalid_argument);
}

}  // namespace
}  // namespace veloxquant
