#include "veloxquant/kernels/linear.h"

#include <algorithm>
#include <vector>

#include "hwy/cache_control.h"
#include "veloxquant/core/parallel.h"
#include "veloxquant/kernels/gemm.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "veloxquant/kernels/linear.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace veloxquant {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using F = hn::ScalableTag<float>;
using V = hn::Vec<F>;

// A tile has as many inner products as a vector has lanes, so that a tree of additions turns the sums of all into one vector:
// kRows rows of x by kOuts rows of the weight.
constexpr std::size_t kTile = hn::MaxLanes(F());
constexpr std::size_t kTileRows = kTile >= 8 ? 4 : kTile >= 4 ? 2 : 1, kTileOuts = kTile / kTileRows;

// sums[0 … n): vectors, n a power of two.  Afterwards neighbouring lanes of sums[0] are the sums of the vectors, in order.
template <std::size_t n>
void sum_vectors([[maybe_unused]] V* sums) {
#if HWY_TARGET != HWY_SCALAR  // where a vector is its own sum, and Highway has no shuffles
  const F d;
  for (std::size_t i = 0; i < n / 2; ++i) {
    const V a = sums[2 * i], b = sums[2 * i + 1];
    sums[i] = hn::Add(hn::ConcatEven(d, b, a), hn::ConcatOdd(d, b, a));
  }
  if constexpr (n > 2) sum_vectors<n / 2>(sums);
#endif
}

// y [rows, outs], `width` apart, += x [rows, in] · weight [outs, in] transposed.  The weight passes by once, without the copy that
// a matrix product makes of it, which is worth it for many rows alone.
void multiply_few_rows(const float* x, std::size_t rows, std::size_t in, const float* weight, std::size_t outs, float* y,
                       std::size_t width) {
  const F d;
  constexpr std::size_t kLine = 16;  // floats of a cache line
  const std::size_t lanes = hn::Lanes(d), whole = in / lanes * lanes;
  // What comes next is fetched meanwhile, a share with each tile: rows are too short for the processor to foresee it.
  const std::size_t tiles = (rows + kTileRows - 1) / kTileRows, share = (kTileOuts * in + tiles - 1) / tiles;
  for (std::size_t o = 0; o < outs; o += kTileOuts) {
    const std::size_t tile_outs = std::min(kTileOuts, outs - o);
    const float *next = weight + (o + tile_outs) * in, *end = weight + std::min(outs, o + 2 * kTileOuts) * in;
    for (std::size_t r = 0; r < rows; r += kTileRows) {
      for (const float* stop = std::min(next + share, end); next < stop; next += kLine) hwy::Prefetch(next);
      const std::size_t tile_rows = std::min(kTileRows, rows - r);
      const float *xs[kTileRows], *ws[kTileOuts];
      for (std::size_t i = 0; i < kTileRows; ++i) xs[i] = x + (r + std::min(i, tile_rows - 1)) * in;
      for (std::size_t j = 0; j < kTileOuts; ++j) ws[j] = weight + (o + std::min(j, tile_outs - 1)) * in;
      V sums[kTile];
      for (V& sum : sums) sum = hn::Zero(d);
      for (std::size_t k = 0; k < whole; k += lanes) {
        V w[kTileOuts];
        for (std::size_t j = 0; j < kTileOuts; ++j) w[j] = hn::LoadU(d, ws[j] + k);
        for (std::size_t i = 0; i < kTileRows; ++i) {
          const V v = hn::LoadU(d, xs[i] + k);
          for (std::size_t j = 0; j < kTileOuts; ++j) sums[i * kTileOuts + j] = hn::MulAdd(v, w[j], sums[i * kTileOuts + j]);
        }
      }
      sum_vectors<kTile>(sums);
      HWY_ALIGN float tile[kTile];
      hn::Store(sums[0], d, tile);
      for (std::size_t i = 0; i < tile_rows; ++i) {
        for (std::size_t j = 0; j < tile_outs; ++j) {
          float sum = tile[i * kTileOuts + j];
          for (std::size_t k = whole; k < in; ++k) sum += xs[i][k] * ws[j][k];
          y[(r + i) * width + o + j] += sum;
        }
      }
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace veloxquant
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace veloxquant {

HWY_EXPORT(multiply_few_rows);

namespace {

// Products are shared out as blocks of rows, which keep their part of x in the second-level cache while the weights pass by, and
// where these are few, of outputs too: for many threads, yet not so small that a product gets thin.
constexpr std::size_t kRows = 256, kFewBlocks = 8, kFewestOutputs = 128;

// Fewer rows than this get our own product: at 32, sampling's batch, BLAS's copy of the weights took as long as its product.
constexpr std::size_t kFewestForGemm = 48;

struct Block {
  const LinearMap* map;
  std::size_t row, rows;        // of x
  std::size_t output, outputs;  // of the map
  std::size_t column;           // of y, where the map's outputs begin
};

std::size_t total_out(std::span<const LinearMap> maps) {
  std::size_t total = 0;
  for (const auto& map : maps) total += map.out;
  return total;
}

std::vector<Block> blocks_of(std::span<const LinearMap> maps, std::size_t rows) {
  const std::size_t row_blocks = (rows + kRows - 1) / kRows,
                    share = (kFewBlocks + row_blocks - 1) / std::max<std::size_t>(row_blocks, 1);
  const std::size_t outputs = std::max(kFewestOutputs, (total_out(maps) + share - 1) / share);
  std::vector<Block> blocks;
  for (std::size_t row = 0; row < rows; row += kRows) {
    std::size_t column = 0;
    for (const auto& map : maps) {
      for (std::size_t output = 0; output < map.out; output += outputs)
        blocks.push_back({&map, row, std::min(kRows, rows - row), output, std::min(outputs, map.out - output), column});
      column += map.out;
    }
  }
  return blocks;
}

// What y holds before the product is added to it.
void start_rows(const Block& block, std::size_t width, const float* residual, float* y) {
  const float* bias = block.map->bias ? block.map->bias + block.output : nullptr;
  for (std::size_t r = 0; r < block.rows; ++r, y += width) {
    if (!residual) {
      if (bias) std::copy_n(bias, block.outputs, y);
      if (!bias) std::fill_n(y, block.outputs, 0.0f);
      continue;
    }
    std::copy_n(residual, block.outputs, y);
    residual += width;
    if (bias) std::transform(y, y + block.outputs, bias, y, [](float a, float b) { return a + b; });
  }
}

}  // namespace

void linear(const float* x, std::size_t rows, std::size_t in, std::span<const LinearMap> maps, const float* residual, float* y) {
  const std::size_t width = total_out(maps);
  const auto blocks = blocks_of(maps, rows);
  parallel_for(blocks.size(), 1, [&](std::size_t i, std::size_t) {
    const Block& block = blocks[i];
    const std::size_t at = block.row * width + block.column + block.output;
    const float *rows_of_x = x + block.row * in, *weight = block.map->weight + block.output * in;
    const bool few = block.rows < kFewestForGemm, added = few || residual || block.map->bias;
    if (added) start_rows(block, width, residual ? residual + at : nullptr, y + at);
    if (few) return HWY_DYNAMIC_DISPATCH(multiply_few_rows)(rows_of_x, block.rows, in, weight, block.outputs, y + at, width);
    gemm(false, true, static_cast<int>(block.rows), static_cast<int>(block.outputs), static_cast<int>(in), 1.0f, rows_of_x,
         static_cast<int>(in), weight, static_cast<int>(in), added ? 1.0f : 0.0f, y + at, static_cast<int>(width));
  });
}

void linear_backward(const float* grad_y, std::size_t rows, std::size_t in, std::span<const LinearMap> maps, float* grad_x) {
  const std::size_t width = total_out(maps);
  // Here the inputs are what a product puts out.
  const LinearMap inputs{nullptr, nullptr, in};
  const auto blocks = blocks_of({&inputs, 1}, rows);
  parallel_for(blocks.size(), 1, [&](std::size_t i, std::size_t) {
    const Block& block = blocks[i];
    const float* gained = grad_y + block.row * width;
    float* out = grad_x + block.row * in + block.output;
    float beta = 0.0f;
    for (const auto& map : maps) {
      gemm(false, false, static_cast<int>(block.rows), static_cast<int>(block.outputs), static_cast<int>(map.out), 1.0f, gained,
           static_cast<int>(width), map.weight + block.output, static_cast<int>(in), beta, out, static_cast<int>(in));
      gained += map.out;
      beta = 1.0f;
    }
  });
}

}  // namespace veloxquant
#endif
