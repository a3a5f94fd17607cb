#include "veloxquant/quantize/rotated_pq.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <set>
#include <stdexcept>

#include "tests/quantize/samples.h"
#include "veloxquant/core/parallel.h"
#include "veloxquant/core/random.h"

namespace veloxquant {
namespace {

using ::testing::HasSubstr;

constexpr int kDim = 32;

// Vectors with a mean and correlated channels of very different variance.
std::vector<float> correlated(std::size_t rows, std::uint64_t seed, int dim = kDim) {
  Random random(seed);
  std::vector<float> vectors;
  for (std::size_t row = 0; row < rows; ++row) {
    const double common = random.normal();
    for (int i = 0; i < dim; ++i)
      vectors.push_back(static_cast<float>(3 + std::exp(-i / 6.0) * random.normal() + (i % 3 == 0 ? common : 0)));
  }
  return vectors;
}

QuantizerParameters fitted(const std::vector<float>& vectors, const RotatedPqOptions& options, ErrorMetric metric = {},
                           Rotation rotation = Rotation::kFull, int dim = kDim) {
  return RotatedPqFitter(vectors, dim, std::move(metric), rotation).fit(Side::kKeys, options);
}

// Mean of eᵀGe, G the identity where there is none; per row where `rows` is given.
double error(const QuantizerParameters& parameters, const std::vector<float>& vectors, const SquareMatrix& metric = {},
             std::vector<double>* rows = nullptr) {
  std::vector<float> restored(vectors.size());
  make_quantizer(parameters)->restore(vectors, restored);
  const auto dim = static_cast<std::size_t>(parameters.dim);
  double sum = 0;
  for (std::size_t begin = 0; begin < vectors.size(); begin += dim) {
    double of_row = 0;
    for (std::size_t i = 0; i < dim; ++i) {
      const double e = vectors[begin + i] - restored[begin + i];
      if (metric.empty()) of_row += e * e;
      for (std::size_t j = 0; j < dim && !metric.empty(); ++j)
        of_row += e * metric[i * dim + j] * (vectors[begin + j] - restored[begin + j]);
    }
    if (rows) rows->push_back(of_row);
    sum += of_row;
  }
  return sum / static_cast<double>(vectors.size() / dim);
}

TEST(RotatedPq, MoreCodesAreNeverWorse) {
  const auto training = correlated(2000, 1), test = correlated(500, 2);
  for (const Rotation rotation : {Rotation::kFull, Rotation::kPlane}) {
    double before = std::numeric_limits<double>::infinity();
    for (int codes = 1; codes <= 16; ++codes) {
      const double now = error(fitted(training, {.codes = codes}, {}, rotation), test);
      EXPECT_LE(now, before * 1.02) << codes << " codes";
      before = now;
    }
  }
}

// Vectors of models lie in clusters, which a table over a wider sub-space sees.
TEST(RotatedPq, TwoStagesKeepMoreThanOne) {
  const auto centres = correlated(200, 3);
  const auto clustered = [&](std::size_t rows, std::uint64_t seed) {
    Random random(seed);
    std::vector<float> vectors;
    for (std::size_t row = 0; row < rows; ++row) {
      const std::size_t centre = random.below(200);
      for (std::size_t i = 0; i < kDim; ++i)
        vectors.push_back(static_cast<float>(centres[centre * kDim + i] + 0.1 * random.normal()));
    }
    return vectors;
  };
  const auto training = clustered(16384, 1), test = clustered(2000, 2);
  const auto lost = [&](int stages) { return error(fitted(training, {.codes = 4, .stages = stages}), test); };
  EXPECT_LT(lost(2), 0.9 * lost(1));
}

// A metric in which few directions count: errors go where they cost nothing.
TEST(RotatedPq, ErrorsGoWhereTheMetricIsSmall) {
  SquareMatrix metric(kDim * kDim);
  Random random(5);
  for (int direction = 0; direction < 3; ++direction) {
    std::vector<double> g(kDim);
    for (double& value : g) value = random.normal();
    for (std::size_t i = 0; i < kDim; ++i)
      for (std::size_t j = 0; j < kDim; ++j) metric[i * kDim + j] += g[i] * g[j];
  }
  const auto training = correlated(3000, 1), test = correlated(500, 2);
  const double plain = error(fitted(training, {.codes = 4}), test, metric),
               aware = error(fitted(training, {.codes = 4}, {metric, {}}), test, metric),
               plane = error(fitted(training, {.codes = 4}, {metric, {}}, Rotation::kPlane), test, metric);
  EXPECT_LT(aware, 0.3 * plain);
  EXPECT_LT(plane, plain);
  EXPECT_LT(aware, plane);
}

TEST(RotatedPq, RowsThatCountAreKeptBetter) {
  auto training = correlated(4000, 1);
  std::vector<float> weights(4000, 0.01f);
  for (std::size_t row = 0; row < 4000; row += 8) {
    weights[row] = 10;
    for (std::size_t i = 0; i < kDim; ++i) training[row * kDim + i] += 4;
  }
  std::vector<double> plain, weighted;
  error(fitted(training, {.codes = 2}), training, {}, &plain);
  error(fitted(training, {.codes = 2}, {{}, weights}), training, {}, &weighted);
  double before = 0, after = 0;
  for (std::size_t row = 0; row < 4000; row += 8) before += plain[row], after += weighted[row];
  EXPECT_LT(after, 0.8 * before);
}

// The worst of each block, and only they.
TEST(RotatedPq, PatchesMendTheWorstVectors) {
  const auto training = correlated(2000, 1);
  auto test = correlated(600, 2);
  for (const std::size_t row : {3u, 255u, 256u, 400u, 599u})
    for (std::size_t i = 0; i < kDim; ++i) test[row * kDim + i] += 25 * ((row + i) % 2 == 0 ? 1 : -1);
  std::vector<double> without, with;
  auto parameters = fitted(training, {.codes = 4});
  error(parameters, test, {}, &without);
  parameters.numbers["patches"] = 2;
  error(parameters, test, {}, &with);
  int mended = 0;
  for (std::size_t row = 0; row < 600; ++row) {
    EXPECT_LE(with[row], without[row] * 1.0001);
    mended += with[row] < 0.5 * without[row];
  }
  EXPECT_EQ(mended, 2 + 2 + 2);  // blocks of 256, 256 and 88 tokens
  for (const std::size_t row : {3u, 255u, 256u, 400u, 599u}) EXPECT_LT(with[row], 0.05 * without[row]) << row;
}

TEST(RotatedPq, BytesAreCodesAndPatches) {
  const auto vectors = correlated(300, 1);
  EXPECT_EQ(make_quantizer(fitted(vectors, {.codes = 5}))->encoded_bytes(300), 1500u);
  const std::size_t patch = 1 + 2 + kDim / 2;
  const auto quantizer = make_quantizer(fitted(vectors, {.codes = 5, .patches = 3}));
  EXPECT_EQ(quantizer->token_group(), 256);
  EXPECT_EQ(quantizer->encoded_bytes(0), 0u);
  EXPECT_EQ(quantizer->encoded_bytes(1), 5 + patch);
  EXPECT_EQ(quantizer->encoded_bytes(256), 256 * 5 + 3 * patch);
  EXPECT_EQ(quantizer->encoded_bytes(2), 2 * (5 + patch));
  EXPECT_EQ(quantizer->encoded_bytes(600), 600 * 5 + 3 * 3 * patch);
}

// A token that is not patched when it arrives never will be: what a block grows by is encoded without the originals before it.
TEST(RotatedPq, PatchesOnlyGiveWay) {
  constexpr int kPatches = 4, kCodes = 3;
  constexpr std::size_t kPatch = 3 + kDim / 2;
  const auto vectors = correlated(256, 3);
  const auto quantizer = make_quantizer(fitted(correlated(2000, 1), {.codes = kCodes, .patches = kPatches}));
  std::set<int> before;
  int replaced = 0;
  for (std::size_t tokens = 1; tokens <= 256; ++tokens) {
    std::vector<std::uint8_t> encoded(quantizer->encoded_bytes(tokens));
    quantizer->encode({vectors.data(), tokens * kDim}, encoded);
    std::set<int> places;
    for (std::size_t at = tokens * kCodes; at < encoded.size(); at += kPatch) places.insert(encoded[at]);
    EXPECT_EQ(places.size(), std::min<std::size_t>(tokens, kPatches));
    for (const int place : places) EXPECT_TRUE(before.count(place) || place == static_cast<int>(tokens) - 1) << tokens;
    replaced += tokens > kPatches && places != before;
    before = places;
  }
  EXPECT_GT(replaced, 3);
}

// Sub-spaces of kPlane hold whole planes, and an odd number of codes leaves one sub-space with a single code.
TEST(RotatedPq, PlanesStayTogether) {
  const auto parameters = fitted(correlated(1000, 1), {.codes = 5}, {}, Rotation::kPlane);
  const RotatedPqQuantizer quantizer(parameters);
  ASSERT_EQ(quantizer.subspaces().size(), 3u);
  EXPECT_EQ(quantizer.subspaces()[2].stages(), 1);
  std::size_t column = 0;
  for (const auto& subspace : quantizer.subspaces()) {
    EXPECT_EQ(subspace.dim() % 2, 0);
    for (std::size_t plane = 0; plane < kDim / 2; ++plane) {
      const auto touches = [&](std::size_t dimension) {
        bool any = false;
        for (std::size_t c = column; c < column + static_cast<std::size_t>(subspace.dim()); ++c)
          any |= quantizer.transform()[dimension * kDim + c] != 0;
        return any;
      };
      EXPECT_EQ(touches(plane), touches(plane + kDim / 2));
    }
    column += static_cast<std::size_t>(subspace.dim());
  }
  EXPECT_EQ(column, static_cast<std::size_t>(kDim));
}

TEST(RotatedPq, CodesNeedNotDivideTheDimension) {
  const auto training = correlated(1200, 1, 30);
  for (const int codes : {1, 4, 7, 11, 29, 30}) {
    const RotatedPqQuantizer quantizer(fitted(training, {.codes = codes}, {}, Rotation::kFull, 30));
    int columns = 0, stages = 0;
    for (const auto& subspace : quantizer.subspaces()) columns += subspace.dim(), stages += subspace.stages();
    EXPECT_EQ(columns, 30);
    EXPECT_EQ(stages, codes);
  }
}

TEST(RotatedPq, ConstantVectorsAndSilentHeads) {
  const std::vector<float> constant(400 * kDim, 2.5f);
  EXPECT_NEAR(error(fitted(constant, {.codes = 4}), constant), 0, 1e-9);
  // No gradient at all: neither metric nor weights.
  const auto vectors = correlated(1000, 1);
  const auto silent = fitted(vectors, {.codes = 4}, {SquareMatrix(kDim * kDim), std::vector<float>(1000, 0.0f)});
  EXPECT_NEAR(error(silent, vectors), error(fitted(vectors, {.codes = 4}), vectors), 1e-6);
}

TEST(RotatedPq, FewerVectorsThanCentroids) {
  const auto few = correlated(40, 1);
  const auto parameters = fitted(few, {.codes = 8});
  EXPECT_EQ(parameters.numbers.at("num_centroids"), 40);
  EXPECT_LT(error(parameters, few), 0.05 * error(fitted(few, {.codes = 1, .stages = 1}), correlated(40, 2)));
}

TEST(RotatedPq, SameSeedSameBytesOnAnyThreads) {
  const auto vectors = correlated(3000, 1);
  const int before = num_threads();
  set_num_threads(1);
  const auto alone = fitted(vectors, {.codes = 6, .patches = 2, .seed = 9});
  set_num_threads(3);
  EXPECT_EQ(fitted(vectors, {.codes = 6, .patches = 2, .seed = 9}), alone);
  set_num_threads(before);
}

TEST(RotatedPq, BadInput) {
  const auto vectors = correlated(300, 1);
  const auto problem = [&](auto attempt) {
    try {
      attempt();
    } catch (const std::invalid_argument& error) {
      return std::string(error.what());
    }
    return std::string("no error");
  };
  EXPECT_THAT(problem([&] { fitted(vectors, {.codes = 0}); }), HasSubstr("codes: expected 1 to 32, got 0"));
  EXPECT_THAT(problem([&] { fitted(vectors, {.codes = 17}, {}, Rotation::kPlane); }), HasSubstr("codes: expected 1 to 16, got 17"));
  EXPECT_THAT(problem([&] { fitted(vectors, {.stages = 3}); }), HasSubstr("stages: expected 1 to 2, got 3"));
  EXPECT_THAT(problem([&] { fitted(vectors, {.patches = 65}); }), HasSubstr("patches: expected 0 to 64, got 65"));
  EXPECT_THAT(problem([&] { fitted({}, {}); }), HasSubstr("too few"));
  EXPECT_THAT(problem([&] { fitted(vectors, {}, {SquareMatrix(4), {}}); }), HasSubstr("metric"));
  EXPECT_THAT(problem([&] { fitted(vectors, {}, {{}, {1.0f}}); }), HasSubstr("weights: expected 300, got 1"));
  EXPECT_THAT(problem([&] { fitted(vectors, {}, {{}, std::vector<float>(300, -1.0f)}); }), HasSubstr("weights"));
  EXPECT_THAT(problem([&] { fitted(std::vector<float>(30, 1.0f), {.codes = 1}, {}, Rotation::kPlane, 15); }), HasSubstr("even"));
  auto broken = vectors;
  broken[7] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THAT(problem([&] { fitted(broken, {}); }), HasSubstr("nan"));

  const auto good = fitted(vectors, {.codes = 4});
  const auto refused = [&](auto change) {
    auto parameters = good;
    change(parameters);
    return problem([&] { make_quantizer(parameters); });
  };
  EXPECT_THAT(refused([](auto& p) { p.numbers["codes"] = 33; }), HasSubstr("codes"));
  EXPECT_THAT(refused([](auto& p) { p.numbers["num_centroids"] = 257; }), HasSubstr("num_centroids"));
  EXPECT_THAT(refused([](auto& p) { p.numbers["plane"] = 2; }), HasSubstr("plane"));
  EXPECT_THAT(refused([](auto& p) { p.numbers.erase("patches"); }), HasSubstr("no number patches"));
  EXPECT_THAT(refused([](auto& p) { p.tensors.at("transform").values.assign(kDim * kDim, 0.0f); }), HasSubstr("transform"));
  EXPECT_THAT(refused([](auto& p) { p.tensors.at("mean").values[0] = std::numeric_limits<float>::infinity(); }), HasSubstr("mean"));
  EXPECT_THAT(refused([](auto& p) { p.byte_tensors.at("entries").shape[2] = 31; }), HasSubstr("entries"));
  EXPECT_THAT(refused([](auto& p) { p.byte_tensors.at("entries").values.pop_back(); }), HasSubstr("entries"));
  EXPECT_THAT(refused([](auto& p) { p.byte_tensors.clear(); }), HasSubstr("entries"));
  EXPECT_THAT(refused([](auto& p) { p.byte_tensors.at("entries").values.assign(2 * 256 * kDim, 128); }),
              HasSubstr("sums of two up to 255, got 256"));
  for (const float bad : {0.0f, -1.0f})
    EXPECT_THAT(refused([&](auto& p) { p.tensors.at("scales").values[1] = bad; }), HasSubstr("scales"));
  EXPECT_THAT(refused([](auto& p) { p.tensors.at("scales").values[1] = std::numeric_limits<float>::max(); }), HasSubstr("scales"));
  EXPECT_THAT(refused([](auto& p) { p.tensors.at("scales").values[1] = std::numeric_limits<float>::quiet_NaN(); }),
              HasSubstr("scales"));
  for (const float bad : {0.5f, 1001.0f, -1001.0f})
    EXPECT_THAT(refused([&](auto& p) { p.tensors.at("offsets").values[3] = bad; }), HasSubstr("offsets"));
  EXPECT_THAT(refused([](auto& p) {
                p.tensors.at("offsets").values[3] = 600;
                p.tensors.at("offsets").values[3 + kDim] = 600;
              }),
              HasSubstr("together"));
  const auto plane = fitted(vectors, {.codes = 4}, {}, Rotation::kPlane);
  auto mixed = plane;
  mixed.tensors.at("transform").values[0 * kDim + kDim - 1] = mixed.tensors.at("transform").values[0];
  for (std::size_t i = 0; i < kDim; ++i) mixed.tensors.at("transform").values[i * kDim + (i + 1) % kDim] += 0.01f;
  EXPECT_THAT(problem([&] { make_quantizer(mixed); }), HasSubstr("planes"));
}

// What is looked up where attention reads bytes is what z comes from.
TEST(RotatedPq, BytesAreEntriesOfTheirSpace) {
  const auto vectors = correlated(700, 1);
  for (const Rotation rotation : {Rotation::kFull, Rotation::kPlane}) {
    const RotatedPqQuantizer quantizer(fitted(vectors, {.codes = 7}, {}, rotation));
    ASSERT_EQ(quantizer.planes().empty(), rotation == Rotation::kFull);
    std::size_t begin = 0;
    for (std::size_t s = 0; s < quantizer.subspaces().size(); ++s) {
      const auto& subspace = quantizer.subspaces()[s];
      const ByteTables& bytes = quantizer.byte_tables()[s];
      const auto width = static_cast<std::size_t>(subspace.dim());
      for (std::size_t stage = 0; stage < bytes.entries.size(); ++stage)
        for (const std::size_t entry : {std::size_t{0}, std::size_t{100}, std::size_t{255}})
          for (std::size_t column = 0; column < width; ++column) {
            const float* z = subspace.entry(static_cast<int>(stage), entry);
            double expected = z[column];
            if (rotation == Rotation::kPlane) {
              const std::size_t dimension = quantizer.planes()[s][column / 2] + column % 2 * kDim / 2;
              expected = stage == 0 ? quantizer.mean()[dimension] : 0;
              for (std::size_t i = 0; i < width; ++i) expected += z[i] * quantizer.inverse()[(begin + i) * kDim + dimension];
            }
            EXPECT_NEAR(bytes.value(stage, entry, column), expected, 1e-4) << s << " " << stage << " " << entry;
          }
      begin += width;
    }
  }
}

// Those of format 3 of plans.
TEST(RotatedPq, FloatCodebooksAreRounded) {
  for (const Rotation rotation : {Rotation::kFull, Rotation::kPlane}) {
    const auto vectors = correlated(1500, 1), test = correlated(300, 2);
    const auto made = fitted(vectors, {.codes = 6}, {}, rotation);
    const RotatedPqQuantizer quantizer(made);
    Tensor codebook{{2, 256, kDim}, std::vector<float>(2 * 256 * kDim)};
    std::size_t begin = 0;
    for (const auto& subspace : quantizer.subspaces()) {
      const auto width = static_cast<std::size_t>(subspace.dim());
      for (std::size_t row = 0; row < static_cast<std::size_t>(subspace.stages()) * 256; ++row)
        std::copy_n(subspace.entry(static_cast<int>(row / 256), row % 256), width,
                    codebook.values.begin() + static_cast<std::ptrdiff_t>(row * kDim + begin));
      begin += width;
    }
    auto old = made;
    old.byte_tensors.clear();
    old.tensors.erase("offsets");
    old.tensors.erase("scales");
    old.tensors.emplace("codebook", codebook);
    const auto read = with_byte_tables(old);
    EXPECT_NEAR(error(read, test), error(made, test), 0.05 * error(made, test));  // rounded twice, at 1.5 bits of unlike channels
    EXPECT_EQ(with_byte_tables(old), read);
    EXPECT_THROW(with_byte_tables(made), std::invalid_argument);
    EXPECT_THROW(make_quantizer(old), std::invalid_argument);
    old.tensors.at("codebook").shape[1] = 255;
    EXPECT_THROW(with_byte_tables(old), std::invalid_argument);
  }
}

// Widths are quotients: 8 · 29 / 56 times 56 / 8 is not 29 in floating point.
TEST(RotatedPq, TakesEveryWidthThatItOffers) {
  const auto method = rotated_pq_method();
  for (const int dim : {56, 112, 120, 176, 519})
    for (const double width : method.widths(dim)) EXPECT_DOUBLE_EQ(method.rate(dim, width), width);
}

TEST(RotatedPq, MetricsAreRidgedOnTheirOwnScale) {
  EXPECT_EQ(ridged_metric({}, 2), (SquareMatrix{1, 0, 0, 1}));
  EXPECT_EQ(ridged_metric({0, 0, 0, 0}, 2), (SquareMatrix{1, 0, 0, 1}));
  for (const double scale : {1e-40, 1.0, 1e30}) {
    const auto ridged = ridged_metric({3 * scale, scale, scale, scale}, 2);
    EXPECT_NEAR(ridged[0], 1.51, 1e-12);
    EXPECT_NEAR(ridged[1], 0.5, 1e-12);
    EXPECT_NEAR(ridged[3], 0.51, 1e-12);
  }
}

// Regular, but not in float32.
TEST(RotatedPq, RefusesATransformWithoutAFiniteInverse) {
  auto parameters = fitted(correlated(300, 1), {.codes = 4});
  parameters.tensors.at("transform").values.assign(kDim * kDim, 0.0f);
  for (std::size_t i = 0; i < kDim; ++i) parameters.tensors.at("transform").values[i * kDim + i] = 1e-40f;
  EXPECT_THROW(make_quantizer(parameters), std::invalid_argument);
}

// All that a damaged file can hold must decode without reading beyond the tables.
TEST(RotatedPq, AnyBytesDecode) {
  const auto few = correlated(40, 1);
  const auto quantizer = make_quantizer(fitted(few, {.codes = 4, .patches = 2}));
  std::vector<std::uint8_t> bytes(quantizer->encoded_bytes(20), 0xff);
  std::vector<float> vectors(20 * kDim);
  quantizer->decode(bytes, vectors);
}

}  // namespace
}  // namespace veloxquant
