// What all methods of the table promise.
#include "veloxquant/quantize/registry.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <stdexcept>

#include "tests/quantize/samples.h"
#include "veloxquant/core/parallel.h"

namespace veloxquant {
namespace {

constexpr int kDim = 64;

QuantizerParameters fit(const QuantizerMethod& method, Side side, double width, std::span<const float> vectors, int dim = kDim) {
  return method.fit(vectors, dim, {.side = side, .width = width, .seed = 11, .max_iter = 5});
}

template <class Check>
void for_each_method(Check check) {
  for (const auto& method : quantizer_methods()) {
    for (const Side side : {Side::kKeys, Side::kValues}) {
      SCOPED_TRACE(::testing::Message() << method.name << " of " << to_string(side));
      check(method, side);
    }
  }
}

TEST(Registry, RateIsBytesUsed) {
  for_each_method([](const QuantizerMethod& method, Side side) {
    const auto vectors = testing::keys(512, kDim);
    for (const double width : method.widths(kDim)) {
      SCOPED_TRACE(width);
      const auto quantizer = make_quantizer(fit(method, side, width, vectors));
      EXPECT_EQ(quantizer->dim(), kDim);
      EXPECT_DOUBLE_EQ(quantizer->rate(), method.rate(kDim, width));
      EXPECT_GE(quantizer->rate(), width);
      const auto bytes = testing::encoded(*quantizer, vectors);
      EXPECT_DOUBLE_EQ(static_cast<double>(bytes.size()) * 8 / (512.0 * kDim), method.rate(kDim, width));
    }
  });
}

// All bytes are written, none beyond, and decoding needs nothing else.
TEST(Registry, RestoreIsDecodeOfEncode) {
  for_each_method([](const QuantizerMethod& method, Side side) {
    const auto training = testing::keys(400, kDim);
    const auto quantizer = make_quantizer(fit(method, side, 2, training));
    for (const std::size_t tokens : {0, 1, 2, 31, 32, 33, 65, 700}) {
      SCOPED_TRACE(tokens);
      const auto vectors = testing::keys(tokens, kDim, 2);
      const std::size_t size = quantizer->encoded_bytes(tokens);
      std::vector<std::uint8_t> ones(size + 1, 0xff), zeros(size + 1, 0);
      quantizer->encode(vectors, std::span(ones).first(size));
      quantizer->encode(vectors, std::span(zeros).first(size));
      EXPECT_EQ(ones.back(), 0xff);
      EXPECT_EQ(zeros.back(), 0);
      ones.pop_back(), zeros.pop_back();
      EXPECT_EQ(ones, zeros);
      std::vector<float> decoded(vectors.size()), in_place = vectors;
      quantizer->decode(ones, decoded);
      EXPECT_EQ(testing::restored(*quantizer, vectors), decoded);
      quantizer->restore(in_place, in_place);
      EXPECT_EQ(in_place, decoded);
    }
  });
}

// Caches encode as tokens come: whole groups one by one must give the bytes of all at once.
TEST(Registry, GroupsOfTokensAreIndependent) {
  for_each_method([](const QuantizerMethod& method, Side side) {
    const auto vectors = testing::keys(300, kDim);
    const auto quantizer = make_quantizer(fit(method, side, 2, vectors));
    const auto group = static_cast<std::size_t>(quantizer->token_group());
    std::vector<std::uint8_t> pieces;
    for (std::size_t begin = 0; begin < 300; begin += group) {
      const auto piece =
          testing::encoded(*quantizer, std::span(vectors).subspan(begin * kDim, std::min(group, 300 - begin) * kDim));
      pieces.insert(pieces.end(), piece.begin(), piece.end());
    }
    EXPECT_EQ(testing::encoded(*quantizer, vectors), pieces);
  });
}

TEST(Registry, MoreBitsNeverWorse) {
  for_each_method([](const QuantizerMethod& method, Side side) {
    for (const auto& vectors : {testing::keys(512, kDim), testing::gaussian(512, kDim)}) {
      double before = std::numeric_limits<double>::infinity();
      for (const double width : method.widths(kDim)) {
        SCOPED_TRACE(width);
        const double error =
            testing::relative_error(vectors, testing::restored(*make_quantizer(fit(method, side, width, vectors)), vectors));
        EXPECT_LE(error, 1.0001 * before);  // entries are bytes: where codes could say more than those, nothing is left to win
        before = error;
      }
      EXPECT_LT(before, 1e-3);
    }
  });
}

TEST(Registry, OddDimensions) {
  for_each_method([](const QuantizerMethod& method, Side side) {
    for (const int dim : {1, 2, 3, 33, 80, 96}) {
      const auto vectors = testing::gaussian(300, static_cast<std::size_t>(dim));
      for (const double width : method.widths(dim)) {
        SCOPED_TRACE(::testing::Message() << "dim " << dim << ", " << width << " bits");
        const auto quantizer = make_quantizer(fit(method, side, width, vectors, dim));
        for (const float value : testing::restored(*quantizer, vectors)) ASSERT_TRUE(std::isfinite(value));
      }
    }
  });
}

TEST(Registry, ExtremeVectorsStayFinite) {
  for_each_method([](const QuantizerMethod& method, Side side) {
    const auto quantizer = make_quantizer(fit(method, side, 2, testing::keys(300, kDim)));
    for (const float scale : {0.0f, 1e-42f, 1e-30f, 1e-6f, 1e5f, 1e30f}) {
      auto vectors = testing::gaussian(33, kDim);
      for (auto& value : vectors) value *= scale;
      for (const float value : testing::restored(*quantizer, vectors)) ASSERT_TRUE(std::isfinite(value)) << scale;
    }
    const std::vector<float> equal(33 * kDim, 1.25f);
    if (method.name != "vecinfer" && method.name != "rotated_pq" && method.name != "turboquant") {
      EXPECT_EQ(testing::restored(*quantizer, equal), equal);
    }
  });
}

TEST(Registry, SameOnAnyThreads) {
  for_each_method([](const QuantizerMethod& method, Side side) {
    const auto vectors = testing::keys(3000, kDim);
    const int before = num_threads();
    std::vector<QuantizerParameters> parameters;
    std::vector<std::vector<std::uint8_t>> bytes;
    for (const int threads : {1, 2}) {
      set_num_threads(threads);
      parameters.push_back(fit(method, side, 2, vectors));
      bytes.push_back(testing::encoded(*make_quantizer(parameters.back()), vectors));
    }
    set_num_threads(before);
    EXPECT_EQ(parameters[0], parameters[1]);
    EXPECT_EQ(bytes[0], bytes[1]);
  });
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

TEST(Registry, BadFits) {
  for_each_method([](const QuantizerMethod& method, Side side) {
    auto vectors = testing::keys(300, kDim);
    for (const double width : {-1.0, 0.0, 2.1, 9.0, 1e30, std::numeric_limits<double>::quiet_NaN()})
      expect_error([&] { fit(method, side, width, vectors); }, "bits");
    expect_error([&] { fit(method, side, 2, std::span(vectors).first(65)); }, "rows of 64 values, got 65 values");
    expect_error([&] { fit(method, side, 2, vectors, 0); }, "");
    vectors[1000] = std::numeric_limits<float>::quiet_NaN();
    expect_error([&] { fit(method, side, 2, vectors); }, "nan");
  });
}

TEST(Registry, StrictAboutParameters) {
  for_each_method([](const QuantizerMethod& method, Side side) {
    const auto good = fit(method, side, 2, testing::keys(300, kDim));
    EXPECT_EQ(good.method, method.name);
    EXPECT_EQ(good.side, side);
    const auto changed = [&](auto change) {
      return [&good, change] {
        auto parameters = good;
        change(parameters);
        make_quantizer(parameters);
      };
    };
    for (const auto& [name, value] : good.numbers) {
      expect_error(changed([&](auto& p) { p.numbers.erase(name); }), "no number " + name);
      if (name == "seed") {
        expect_error(changed([](auto& p) { p.numbers["seed"] = -1; }), "seed");
        continue;
      }
      const bool may_be_zero = name == "patches" || name == "plane";
      for (const std::int64_t bad :
           {std::int64_t{may_be_zero ? -1 : 0}, std::int64_t{-1}, std::int64_t{1} << 40, std::numeric_limits<std::int64_t>::min()})
        expect_error(changed([&, bad](auto& p) { p.numbers[name] = bad; }), std::to_string(bad));
    }
    for (const auto& [name, tensor] : good.tensors) {
      expect_error(changed([&](auto& p) { p.tensors.erase(name); }), "no tensor " + name);
      expect_error(changed([&](auto& p) { p.tensors[name].values.back() = std::numeric_limits<float>::infinity(); }), name);
      expect_error(changed([&](auto& p) { p.tensors[name].values.pop_back(); }), name);
      expect_error(changed([&](auto& p) { p.tensors[name].shape.push_back(1); }), name);
    }
    expect_error(changed([](auto& p) { p.numbers["more"] = 1; }), "unknown number more");
    expect_error(changed([](auto& p) { p.tensors["more"] = {}; }), "unknown tensor more");
    for (const int dim : {0, -64, 1 << 30}) expect_error(changed([dim](auto& p) { p.dim = dim; }), "dim");
  });
  auto parameters = fit(quantizer_method("vecinfer"), Side::kKeys, 2, testing::keys(300, kDim));
  parameters.tensors["smooth_factors"].values[3] = 0;
  expect_error([&] { make_quantizer(parameters); }, "smooth_factors: expected positive values, got 0");
}

TEST(Registry, DimsThatDoNotSuitAreSaid) {
  const auto vectors = testing::gaussian(1, 1026);
  expect_error([&] { fit(quantizer_method("turboquant"), Side::kKeys, 2, vectors, 1026); },
               "head_dim: expected 2 to 1024 or a power of two, got 1026");
  expect_error([&] { fit(quantizer_method("vecinfer"), Side::kKeys, 2, std::span(vectors).first(24), 24); },
               "head_dim: expected a power of two, got 24");
  for_each_method([](const QuantizerMethod& method, Side) {
    for (const int dim : {2, 24, 1024, 1026, 4096}) {
      if (method.widths(dim).empty()) {
        expect_error([&] { check_dim(method, dim); }, std::to_string(dim));
      } else {
        EXPECT_NO_THROW(check_dim(method, dim));
      }
    }
  });
}

TEST(Registry, RateIsOfWidthsOnOffer) {
  for_each_method([](const QuantizerMethod& method, Side) {
    for (const double width : {0.0, 1.3, 9.0}) expect_error([&] { method.rate(kDim, width); }, "bits");
  });
}

TEST(Registry, WhoLearnsNeedsVectors) {
  EXPECT_EQ(quantizer_names(), (std::vector<std::string>{"affine", "kivi", "turboquant", "vecinfer", "rotated_pq"}));
  EXPECT_EQ(scalar_quantizer_names(), (std::vector<std::string>{"affine", "kivi", "turboquant"}));
  for_each_method([](const QuantizerMethod& method, Side side) {
    const auto vectors = testing::gaussian(static_cast<std::size_t>(method.least_vectors), kDim);
    EXPECT_NO_THROW(fit(method, side, 1, vectors));
    if (method.learns()) expect_error([&] { fit(method, side, 1, std::span(vectors).subspan(kDim)); }, "too few");
  });
}

TEST(Registry, Names) {
  expect_error([] { quantizer_method("gzip"); }, "unknown method \"gzip\"; there are affine, kivi, turboquant, vecinfer");
  EXPECT_EQ(quantizer_method("kivi").name, "kivi");
  EXPECT_EQ(to_string(Side::kValues), "values");
}

}  // namespace
}  // namespace veloxquant
