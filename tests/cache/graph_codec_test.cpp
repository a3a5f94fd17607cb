#include "veloxquant/cache/graph_codec.h"

#include <gtest/gtest.h>

#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "tests/cache/packed_inputs.h"
#include "veloxquant/cache/block_codec.h"
#include "veloxquant/model/cpu_operation.h"

namespace veloxquant {
namespace {

using testing::random_array;

constexpr int kRows = 2, kBlock = static_cast<int>(kPackedBlockTokens);

QuantizerParameters fitted(const char* method, int dim, double width, Side side = Side::kValues) {
  const auto x = random_array({2000, dim}, 7);
  return quantizer_method(method).fit({x.data<float>(), x.size()}, dim, {.side = side, .width = width, .max_iter = 3});
}

QuantizerParameters rotated(int dim, int codes, int patches, int stages = 2) {
  const auto x = random_array({2000, dim}, 7);
  return RotatedPqFitter({x.data<float>(), x.size()}, dim, {}, Rotation::kFull)
      .fit(Side::kValues, {.codes = codes, .stages = stages, .patches = patches, .max_iter = 2});
}

// Vectors of two rows appended in chunks, to blocks of each codec: the same bytes if `same_bytes`, or else vectors that are read
// alike, but for one that lies within rounding of a boundary and gets another code.
void expect_alike(const QuantizerParameters& parameters, const std::vector<int>& chunks, bool same_bytes) {
  const Rope rope({}, parameters.dim);
  const auto reference = make_block_codec(parameters, parameters.side == Side::kKeys ? &rope : nullptr);
  const GraphCodec codec(parameters);
  ASSERT_EQ(codec.block_bytes() % 16, 0);
  ASSERT_LT(codec.block_bytes() - static_cast<int>(block_shape(parameters).bytes), 16);
  std::vector<std::vector<std::uint8_t>> expected(kRows, std::vector<std::uint8_t>(static_cast<std::size_t>(codec.block_bytes())));
  std::vector<OpenBlock> open(kRows);
  GraphCodec::Blocks blocks{mx::full({kRows, codec.block_bytes()}, 77, mx::uint8), mx::full({kRows, codec.patches()}, 1e9f)};
  int at = 0;
  const auto dim = static_cast<std::size_t>(parameters.dim);
  for (const int count : chunks) {
    const auto x = random_array({kRows, count, parameters.dim}, static_cast<std::uint64_t>(100 + at));
    blocks = codec.append(blocks, at, x);
    const std::size_t size = static_cast<std::size_t>(count) * dim;
    for (std::size_t row = 0; row < kRows; ++row)
      reference->append({x.data<float>() + row * size, size}, static_cast<std::size_t>(at), expected[row].data(), open[row]);
    at += count;
  }
  const auto vectors = mx::contiguous(codec.decode(mx::expand_dims(blocks.bytes, 1), at));
  mx::eval(blocks.bytes, blocks.errors, vectors);
  ASSERT_EQ(vectors.shape(), (mx::Shape{kRows, at, parameters.dim}));
  int other_bytes = 0, other_vectors = 0;
  std::vector<float> read(static_cast<std::size_t>(at) * dim);
  for (std::size_t row = 0; row < kRows; ++row) {
    for (std::size_t i = 0; i < expected[row].size(); ++i)
      other_bytes += blocks.bytes.data<std::uint8_t>()[row * expected[row].size() + i] != expected[row][i];
    reference->decode(expected[row].data(), static_cast<std::size_t>(at), read.data());
    for (std::size_t i = 0; i < read.size(); ++i)
      other_vectors += std::abs(vectors.data<float>()[row * read.size() + i] - read[i]) > 1e-4f;
    for (std::size_t p = 0; p < open[row].patch_errors.size(); ++p)
      EXPECT_NEAR(blocks.errors.data<float>()[row * static_cast<std::size_t>(codec.patches()) + p], open[row].patch_errors[p],
                  1e-4f * open[row].patch_errors[p]);
  }
  if (same_bytes) EXPECT_EQ(other_bytes, 0) << parameters.method;
  EXPECT_LE(other_vectors, same_bytes ? 0 : 2 * parameters.dim) << parameters.method;
}

// With our kernels codes are the quantizer's to the last bit, but for turboquant, which scales after it has rotated, not before. By
// MLX's own operations, whose products are a library's, another of several pairs of entries with one sum may be chosen.
void expect_alike(const QuantizerParameters& parameters, const std::vector<int>& chunks) {
  expect_alike(parameters, chunks, parameters.method != "turboquant");
  const MlxOperationsScope scope;
  expect_alike(parameters, chunks, false);
}

const std::vector<std::vector<int>> kChunks = {{kBlock}, {1, 1, 1, 5, 40, 1, 130, 1, 76}, {3}, {100, 100}};

TEST(GraphCodec, BytesAreThoseOfTheBlockCodec) {
  std::vector<QuantizerParameters> all = {fitted("vecinfer", 64, 2, Side::kKeys), fitted("vecinfer", 64, 2, Side::kValues)};
  for (const int subspaces : {1, 16, 32})
    for (const int centroids : {16, 32}) {
      const auto [keys, values] = testing::product_codes(testing::Sequence(1, 400, 64), 64, subspaces, centroids);
      all.insert(all.end(), {keys[0], values[0]});
    }
  for (const int dim : {64, 80})
    for (const double width : {2, 3, 6})
      for (const char* method : {"affine", "turboquant"}) all.push_back(fitted(method, dim, width));
  for (const auto& parameters : all)
    for (const auto& chunks : kChunks) expect_alike(parameters, chunks);
}

TEST(GraphCodec, RotatedPqTilesAndPatches) {
  std::vector<QuantizerParameters> all = {rotated(80, 11, 3), rotated(64, 6, 3, /* stages= */ 1),
                                          rotated(7, 5, 3)};  // whose patches end within a byte
  for (const int codes : {1, 9, 16})
    for (const int patches : {0, 5, 64}) all.push_back(rotated(64, codes, patches));
  for (const auto& parameters : all)
    for (const auto& chunks : kChunks) expect_alike(parameters, chunks);
}

TEST(GraphCodec, ReadsBlocksInARow) {
  const GraphCodec codec(rotated(64, 9, 5));
  std::vector<mx::array> bytes, vectors;
  for (std::uint64_t i = 0; i < 3; ++i) {
    const auto block = codec.append({mx::array(0), mx::array(0)}, 0, random_array({kRows, i < 2 ? kBlock : 30, 64}, 20 + i));
    bytes.push_back(block.bytes);
    vectors.push_back(codec.decode(mx::expand_dims(block.bytes, 1), i < 2 ? kBlock : 30));
  }
  const auto all = codec.decode(mx::stack(bytes, 1), 2 * kBlock + 30);
  EXPECT_TRUE(mx::allclose(all, mx::concatenate(vectors, 1), 1e-5, 1e-5).item<bool>());
}

// Of equal errors the earlier stays.
TEST(GraphCodec, EqualErrorsKeepTheEarlierPatch) {
  const auto parameters = rotated(64, 4, 2);
  const auto one = random_array({1, 1, 64}, 3);
  const auto same = mx::contiguous(mx::broadcast_to(one, {1, 5, 64}));
  mx::eval(same);
  const GraphCodec codec(parameters);
  auto blocks = codec.append({mx::array(0), mx::array(0)}, 0, same);
  blocks = codec.append(blocks, 5, mx::broadcast_to(one, {1, 3, 64}));
  mx::eval(blocks.bytes);
  const std::uint8_t* patches = blocks.bytes.data<std::uint8_t>() + 4 * kBlock;
  EXPECT_EQ(patches[0], 0);
  EXPECT_EQ(patches[3 + 32], 1);
}

}  // namespace
}  // namespace veloxquant
