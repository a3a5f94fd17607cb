#include "veloxquant/quantize/vecinfer.h"

#include <gtest/gtest.h>

#include <cmath>
#include <stdexcept>

#include "tests/quantize/samples.h"
#include "veloxquant/kernels/hadamard.h"
#include "veloxquant/quantize/kmeans.h"

namespace veloxquant {
namespace {

constexpr int kDim = 32;

double dot(const float* a, const float* b, std::size_t n) {
  double sum = 0;
  for (std::size_t i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * b[i];
  return sum;
}

TEST(VecInfer, SmoothFactorsAreRootsOfMaxima) {
  const auto factors = smooth_factors(std::vector<float>{1, -9, 0, -4, 2, 0}, 3);
  EXPECT_EQ(factors, (std::vector<float>{2, 3, 1}));
}

TEST(VecInfer, DualTransformKeepsProducts) {
  const std::size_t dim = 64, rows = 50;
  auto keys = testing::keys(rows, dim, 1), queries = testing::gaussian(rows, dim, 2);
  const auto original_keys = keys, original_queries = queries;
  const auto factors = smooth_factors(keys, static_cast<int>(dim));
  transform_keys(keys, factors);
  transform_queries(queries, factors);
  for (std::size_t i = 0; i < rows; ++i) {
    const float *k = original_keys.data() + i * dim, *q = original_queries.data() + i * dim;
    const double scale = std::sqrt(dot(k, k, dim) * dot(q, q, dim));
    EXPECT_NEAR(dot(keys.data() + i * dim, queries.data() + i * dim, dim), dot(k, q, dim), 2e-6 * scale);
  }
  restore_keys(keys, factors);
  for (std::size_t i = 0; i < keys.size(); ++i) ASSERT_NEAR(keys[i], original_keys[i], 1e-4);
}

// The documented order: divide by λ, then multiply by H.
TEST(VecInfer, TransformIsTheDocumentedProduct) {
  const auto factors = std::vector<float>{1, 2, 4, 8};
  std::vector<float> key = {8, 8, 8, 8}, query = {1, 1, 1, 1};
  transform_keys(key, factors);
  transform_queries(query, factors);
  EXPECT_EQ(key, (std::vector<float>{7.5f, 2.5f, 4.5f, 1.5f}));  // (8, 4, 2, 1) · H
  EXPECT_EQ(query, (std::vector<float>{7.5f, -2.5f, -4.5f, 1.5f}));
}

struct Fitted {
  QuantizerParameters parameters;
  std::unique_ptr<const Quantizer> quantizer;
};

Fitted fitted(Side side, double width, const std::vector<float>& vectors, int dim = kDim) {
  auto parameters = vecinfer_method().fit(vectors, dim, {.side = side, .width = width, .seed = 3, .max_iter = 10});
  auto quantizer = make_quantizer(parameters);
  return {std::move(parameters), std::move(quantizer)};
}

// Decoded with nothing but the parameters: codes are whole bytes at 256 centroids.
TEST(VecInfer, BytesAreIndicesOfNearestCentroids) {
  for (const Side side : {Side::kKeys, Side::kValues}) {
    SCOPED_TRACE(to_string(side));
    const auto vectors = testing::keys(600, kDim);
    const auto [parameters, quantizer] = fitted(side, 2, vectors);
    const auto& codebook = parameters.tensors.at("codebook");
    ASSERT_EQ(codebook.shape, (std::vector<std::int64_t>{8, 256, 4}));
    auto transformed = vectors;
    if (side == Side::kKeys) transform_keys(transformed, parameters.tensors.at("smooth_factors").values);
    const auto bytes = testing::encoded(*quantizer, vectors);
    ASSERT_EQ(bytes.size(), 600u * 8);
    for (std::size_t i = 0; i < bytes.size(); ++i) {
      const float *piece = transformed.data() + i * 4, *centroids = codebook.values.data() + i % 8 * 256 * 4;
      const auto distance = [&](std::size_t c) {
        double sum = 0;
        for (std::size_t j = 0; j < 4; ++j) sum += std::pow(static_cast<double>(piece[j]) - centroids[c * 4 + j], 2);
        return sum;
      };
      double best = distance(0);
      for (std::size_t c = 1; c < 256; ++c) best = std::min(best, distance(c));
      ASSERT_LE(distance(bytes[i]), best + 1e-4);
    }
  }
}

TEST(VecInfer, TablesGiveTheProductWithTheRestoredKey) {
  const auto vectors = testing::keys(700, kDim);
  const auto [parameters, quantizer] = fitted(Side::kKeys, 2, vectors);
  const auto& factors = parameters.tensors.at("smooth_factors").values;
  const ProductCodebook codebook(parameters.tensors.at("codebook"));
  const auto queries = testing::gaussian(20, kDim, 5), restored = testing::restored(*quantizer, vectors);
  auto transformed = queries;
  transform_queries(transformed, factors);
  std::vector<float> tables(20 * 8 * 256);
  codebook.query_tables(transformed, tables);
  const auto bytes = testing::encoded(*quantizer, vectors);
  for (std::size_t q = 0; q < 20; ++q) {
    for (std::size_t k = 0; k < 700; k += 7) {
      double score = 0;
      for (std::size_t s = 0; s < 8; ++s) score += tables[(q * 8 + s) * 256 + bytes[k * 8 + s]];
      const float *key = restored.data() + k * kDim, *query = queries.data() + q * kDim;
      ASSERT_NEAR(score, dot(key, query, kDim), 1e-5 * std::sqrt(dot(key, key, kDim) * dot(query, query, kDim)));
    }
  }
}

// Codes of 1 to 12 bits.
TEST(VecInfer, AnyPowerOfTwoOfCentroids) {
  const auto vectors = testing::gaussian(4500, 8);
  double before = 10;
  for (int bits = 1; bits <= 12; bits += 1) {
    SCOPED_TRACE(bits);
    const int centroids = 1 << bits;
    auto codebook = train_product_codebook(vectors, 8, 4, {.num_centroids = centroids, .max_iter = 3, .seed = 1});
    const auto quantizer = make_quantizer(vecinfer_parameters(Side::kValues, 8, {}, std::move(codebook)));
    EXPECT_EQ(quantizer->encoded_bytes(3), 3 * static_cast<std::size_t>((4 * bits + 7) / 8));
    const double error = testing::relative_error(vectors, testing::restored(*quantizer, vectors));
    EXPECT_LT(error, before);
    before = error;
  }
}

TEST(VecInfer, SmoothingHelpsKeys) {
  const auto vectors = testing::keys(3000, kDim);
  const auto keys = fitted(Side::kKeys, 2, vectors), values = fitted(Side::kValues, 2, vectors);
  EXPECT_EQ(values.parameters.tensors.count("smooth_factors"), 0u);
  EXPECT_LT(testing::relative_error(vectors, testing::restored(*keys.quantizer, vectors)), 0.1);
  EXPECT_LT(testing::relative_error(vectors, testing::restored(*values.quantizer, vectors)), 0.1);
}

template <class Call>
void expect_error(Call call, const std::string& text) {
  try {
    call();
    FAIL() << "no error that says " << text;
  } catch (const std::invalid_argument& error) {
    EXPECT_NE(std::string(error.what()).find(text), std::string::npos) << error.what();
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
  }
}

TEST(VecInfer, BadFits) {
  const auto fit = [](int dim, double width, std::size_t tokens, Side side) {
    vecinfer_method().fit(testing::gaussian(tokens, static_cast<std::size_t>(dim)), dim, {.side = side, .width = width});
  };
  expect_error([&] { fit(80, 2, 300, Side::kKeys); }, "power of two, got 80");
  expect_error([&] { fit(80, 2, 300, Side::kValues); }, "power of two, got 80");
  expect_error([&] { fit(64, 3, 300, Side::kKeys); }, "do not divide 64");
  expect_error([&] { fit(64, 2, 255, Side::kKeys); }, "255 points are too few for 256 centroids");
  expect_error([&] { fit(64, 2, 0, Side::kKeys); }, "too few");
}

}  // namespace
}  // namespace veloxquant
