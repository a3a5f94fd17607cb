// A vector has the same codes however it comes and whichever processor chooses them.  CMake runs these tests under other kernels of
// OpenBLAS, too.
#include <gtest/gtest.h>

#include "tests/kernels/every_target.h"
#include "veloxquant/core/hash.h"
#include "veloxquant/quantize/registry.h"

namespace veloxquant {
namespace {

// Multiples of 2⁻²³ in [−1, 1), which every machine makes alike: no fit, whose linear algebra is a library's.
std::vector<float> uniform_values(std::size_t count, std::uint64_t seed) {
  Random random(seed);
  std::vector<float> values(count);
  for (auto& value : values) value = static_cast<float>(static_cast<double>(random.below(1 << 24)) * 0x1p-23 - 1);
  return values;
}

Tensor uniform_tensor(std::vector<std::int64_t> shape, std::uint64_t seed) {
  std::size_t size = 1;
  for (const auto n : shape) size *= static_cast<std::size_t>(n);
  return {std::move(shape), uniform_values(size, seed)};
}

// Entries of which each has a twin whose values differ in the last bit: rounding decides between them.
Tensor twin_codebook(int tables, int width, std::uint64_t seed) {
  constexpr int kEntries = 256;
  auto codebook = uniform_tensor({tables, kEntries, width}, seed);
  const auto half = static_cast<std::size_t>(kEntries / 2 * width);
  for (std::size_t i = 0; i < codebook.values.size(); ++i)
    if (i / half % 2 == 1) codebook.values[i] = codebook.values[i - half] + (i % 3 == 0 ? 0x1p-23f : -0x1p-23f);
  return codebook;
}

QuantizerParameters rotated_pq(int dim, int codes, int stages) {
  QuantizerParameters parameters{.method = "rotated_pq", .side = Side::kKeys, .dim = dim, .numbers = {}, .tensors = {}};
  parameters.numbers = {{"codes", codes}, {"stages", stages}, {"num_centroids", 256}, {"patches", 0}, {"plane", 0}};
  parameters.tensors.emplace("mean", uniform_tensor({dim}, 1));
  parameters.tensors.emplace("transform", uniform_tensor({dim, dim}, 2));
  parameters.tensors.emplace("codebook", twin_codebook(stages, dim, 3));
  return parameters;
}

QuantizerParameters vecinfer(Side side, int dim, int subspaces) {
  QuantizerParameters parameters{.method = "vecinfer", .side = side, .dim = dim, .numbers = {}, .tensors = {}};
  parameters.numbers = {{"num_subspaces", subspaces}, {"num_centroids", 256}};
  parameters.tensors.emplace("codebook", twin_codebook(subspaces, dim / subspaces, 4));
  if (side == Side::kKeys) parameters.tensors.emplace("smooth_factors", Tensor{{dim}, std::vector<float>(dim, 0.75f)});
  return parameters;
}

QuantizerParameters without_tensors(const char* method, int dim) {
  return quantizer_method(method).fit(uniform_values(64 * static_cast<std::size_t>(dim), 5), dim,
                                      {.side = Side::kKeys, .width = 3});
}

std::vector<QuantizerParameters> all_methods() {
  return {rotated_pq(64, 16, 2),
          rotated_pq(80, 11, 2),
          rotated_pq(128, 32, 1),
          vecinfer(Side::kKeys, 64, 16),
          vecinfer(Side::kValues, 96, 12),
          without_tensors("affine", 80),
          without_tensors("turboquant", 64),
          without_tensors("turboquant", 80)};
}

constexpr std::size_t kRows = 300;

std::vector<std::uint8_t> encoded(const Quantizer& quantizer, std::size_t rows_a_call) {
  const auto dim = static_cast<std::size_t>(quantizer.dim());
  const auto vectors = uniform_values(kRows * dim, 6);
  std::vector<std::uint8_t> bytes(quantizer.encoded_bytes(kRows));
  const std::size_t size = quantizer.encoded_bytes(1);
  for (std::size_t row = 0; row < kRows; row += rows_a_call) {
    const std::size_t rows = std::min(rows_a_call, kRows - row);
    quantizer.encode(std::span(vectors).subspan(row * dim, rows * dim), std::span(bytes).subspan(row * size, rows * size));
  }
  return bytes;
}

TEST(SameCodes, HoweverManyTokensCome) {
  for (const auto& parameters : all_methods()) {
    SCOPED_TRACE(::testing::Message() << parameters.method << " " << parameters.dim);
    const auto quantizer = make_quantizer(parameters);
    testing::for_each_target([&] {
      const auto all = encoded(*quantizer, kRows);
      for (const std::size_t rows : {1, 2, 7, 64}) EXPECT_EQ(encoded(*quantizer, rows), all) << rows << " tokens a call";
    });
  }
}

// A change of these makes other caches of old plans.
TEST(SameCodes, OnEveryProcessor) {
  struct Expected {
    QuantizerParameters parameters;
    const char *rounded_once, *rounded_twice;  // where the steps of a product are, in one instruction or in two
  };
  const Expected all[] = {
      {rotated_pq(64, 16, 2), "d398996f316d7209", "4f67e84fe8750295"},
      {rotated_pq(80, 11, 2), "bda4d5f66db1673d", "2778210eef10bc1a"},
      {rotated_pq(128, 32, 1), "3f8ba9a677d8565d", "920c7e560f88e0f5"},
      {vecinfer(Side::kKeys, 64, 16), "9037d8d26a7cfb3a", "a7c3898ce8665a61"},
      {vecinfer(Side::kValues, 96, 12), "29e4880bf43c27e9", "efe0521e0f79e344"},
      {without_tensors("affine", 80), "830be1255361e3be", "830be1255361e3be"},
  };
  for (const auto& [parameters, rounded_once, rounded_twice] : all) {
    SCOPED_TRACE(::testing::Message() << parameters.method << " " << parameters.dim);
    const auto quantizer = make_quantizer(parameters);
    testing::for_each_target([&] {
      const auto bytes = encoded(*quantizer, kRows);
      EXPECT_EQ(sha256({reinterpret_cast<const char*>(bytes.data()), bytes.size()}).substr(0, 16),
                testing::rounds_once() ? rounded_once : rounded_twice);
    });
  }
}

}  // namespace
}  // namespace veloxquant
