// A vector has the same codes however it comes and whichever processor chooses them.  CMake runs these tests under other kernels of
// OpenBLAS, too.
#include <gtest/gtest.h>

#include "tests/kernels/every_target.h"
#include "veloxquant/core/hash.h"
#include "veloxquant/quantize/registry.h"
#include "veloxquant/quantize/rotated_pq.h"

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

// Vectors whose halves are alike.
std::vector<float> even_vectors(std::size_t rows, std::size_t dim, std::uint64_t seed) {
  auto values = uniform_values(rows * dim, seed);
  for (std::size_t i = 0; i < values.size(); ++i)
    if (i % dim >= dim / 2) values[i] = values[i - dim / 2];
  return values;
}

constexpr int kEntries = 256;

// Of such vectors every other column of the rotated one is zero but for rounding, and entries come in pairs, mirrored in these
// columns: rounding decides between the two.
QuantizerParameters rotated_pq(int dim, int codes, int stages) {
  QuantizerParameters parameters{.method = "rotated_pq", .side = Side::kKeys, .dim = dim, .numbers = {}, .tensors = {}};
  parameters.numbers = {{"codes", codes}, {"stages", stages}, {"num_centroids", kEntries}, {"patches", 0}, {"plane", 0}};
  const auto width = static_cast<std::size_t>(dim), half = width / 2;
  auto transform = uniform_tensor({dim, dim}, 2), codebook = uniform_tensor({stages, kEntries, dim}, 3);
  for (std::size_t i = half; i < width; ++i)
    for (std::size_t j = 0; j < width; j += 2) transform.values[i * width + j] = -transform.values[(i - half) * width + j];
  for (std::size_t row = 0; row < static_cast<std::size_t>(stages * kEntries); ++row)
    for (std::size_t j = 0; j < width && row % kEntries >= kEntries / 2; ++j)
      codebook.values[row * width + j] = (j % 2 == 0 ? -1.0f : 1.0f) * codebook.values[(row - kEntries / 2) * width + j];
  parameters.tensors = {{"mean", {{dim}, even_vectors(1, width, 1)}}, {"transform", transform}, {"codebook", codebook}};
  return with_byte_tables(std::move(parameters));
}

// Entries come in pairs that differ in the last bits.
Tensor codebook_of_twins(int tables, int width, std::uint64_t seed) {
  auto codebook = uniform_tensor({tables, kEntries, width}, seed);
  const auto half = static_cast<std::size_t>(kEntries / 2 * width);
  for (std::size_t i = 0; i < codebook.values.size(); ++i)
    if (i / half % 2 == 1) codebook.values[i] = codebook.values[i - half] + (i % 3 == 0 ? 0x1p-23f : -0x1p-23f);
  return codebook;
}

QuantizerParameters vecinfer(Side side, int dim, int subspaces) {
  QuantizerParameters parameters{.method = "vecinfer", .side = side, .dim = dim, .numbers = {}, .tensors = {}};
  parameters.numbers = {{"num_subspaces", subspaces}, {"num_centroids", 256}};
  parameters.tensors.emplace("codebook", codebook_of_twins(subspaces, dim / subspaces, 4));
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
  const auto vectors = even_vectors(kRows, dim, 6);
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
      {rotated_pq(64, 16, 2), "49403a750e8175ae", "49403a750e8175ae"},
      {rotated_pq(80, 11, 2), "df8650e8a310df73", "df8650e8a310df73"},
      {rotated_pq(128, 32, 1), "4ea5a4440623bbe3", "4ea5a4440623bbe3"},
      {vecinfer(Side::kKeys, 64, 16), "f46a0b73d4149e71", "74be865cc5dc1bcd"},
      {vecinfer(Side::kValues, 96, 12), "5f3cb41e7e3ec017", "46f3138be81673e5"},
      {without_tensors("affine", 80), "ca29555f3ea12afa", "ca29555f3ea12afa"},
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
