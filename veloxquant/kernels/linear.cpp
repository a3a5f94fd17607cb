#include "veloxquant/kernels/linear.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "hwy/cache_control.h"
#include "veloxquant/core/parallel.h"
#include "veloxquant/kernels/gemm.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "veloxquant/kernels/linear.cpp"
// clang-format off
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "veloxquant/kernels/rows-inl.h"
#include "veloxquant/kernels/stored_rows-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace veloxquant {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using F = hn::ScalableTag<float>;
using V = hn::Vec<F>;

// A tile has as many inner products as a vector has lanes, so that a tree of additions turns the sums of all into one vector:
// up to kTileRows rows of x by the rows of the weight that are left.
constexpr std::size_t kTile = hn::MaxLanes(F());
constexpr std::size_t kTileRows = kTile >= 8 ? 4 : kTile >= 4 ? 2 : 1;

constexpr std::size_t kLine = 64;  // bytes of a cache line

// y [kRows, outs], `width` apart, += x [kRows, in] · weight [outs, in] transposed.  The weight passes by once, as one stream, which
// is what the processor fetches ahead best.
template <std::size_t kRows, class Weight>
void multiply_stream(const float* x, std::size_t in, Weight& weight, std::size_t outs, float* y, std::size_t width) {
  const F d;
  // Independent sums hide the time that an addition takes.
  constexpr std::size_t kSums = 4, kOuts = kTile / kRows, kAhead = 1024, kOfGroup = std::min(kSums, kGroup / kTile);
  const std::size_t lanes = hn::Lanes(d), whole = in / lanes * lanes, open = std::min(whole, weight.open() / lanes * lanes);
  for (std::size_t o = 0; o < outs; o += kOuts) {
    const std::size_t tile_outs = std::min(kOuts, outs - o);
    weight.seek(o, tile_outs);
    V tile[kTile];
    for (V& sum : tile) sum = hn::Zero(d);
    for (std::size_t j = 0; j < tile_outs; ++j) {
      const auto w = weight.row(j);
      V sums[kRows][kSums];
      for (auto& of_row : sums)
        for (V& sum : of_row) sum = hn::Zero(d);
      const auto add_column = [&](std::size_t k, const auto& group, std::size_t s, auto may_read_on) HWY_ATTR {
        const V v = w.template load<decltype(may_read_on)::value>(k, group);
        for (std::size_t i = 0; i < kRows; ++i) sums[i][s] = hn::MulAdd(hn::LoadU(d, x + i * in + k), v, sums[i][s]);
      };
      std::size_t k = 0;
      for (; k + kSums * lanes <= open; k += kSums * lanes) {
        hwy::Prefetch(w.byte(k) + kAhead);
        for (std::size_t s = 0; s < kSums; s += kOfGroup) {
          const auto group = w.group(k + s * lanes);
          for (std::size_t i = s; i < s + kOfGroup; ++i) add_column(k + i * lanes, group, i, std::true_type());
        }
      }
      for (; k < open; k += lanes) add_column(k, w.group(k), 0, std::true_type());
      for (; k < whole; k += lanes) add_column(k, w.group(k), 0, std::false_type());
      for (std::size_t i = 0; i < kRows; ++i) {
        tile[i * kOuts + j] = hn::Add(hn::Add(sums[i][0], sums[i][1]), hn::Add(sums[i][2], sums[i][3]));
        for (; k < in; ++k) y[i * width + o + j] += x[i * in + k] * w.at(k);
        k = whole;
      }
    }
    sum_vectors<kTile>(tile);
    HWY_ALIGN float sums[kTile];
    hn::Store(tile[0], d, sums);
    for (std::size_t i = 0; i < kRows; ++i)
      for (std::size_t j = 0; j < tile_outs; ++j) y[i * width + o + j] += sums[i * kOuts + j];
  }
}

// The same of more rows, in tiles of kTileRows of them.
template <class Weight>
void multiply_tiles(const float* x, std::size_t rows, std::size_t in, Weight& weight, std::size_t outs, float* y,
                    std::size_t width) {
  const F d;
  constexpr std::size_t kOuts = kTile / kTileRows;
  const std::size_t lanes = hn::Lanes(d), whole = in / lanes * lanes, open = std::min(whole, weight.open() / lanes * lanes);
  for (std::size_t o = 0; o < outs; o += kOuts) {
    const std::size_t tile_outs = std::min(kOuts, outs - o);
    weight.seek(o, tile_outs);
    typename Weight::Row ws[kOuts];
    for (std::size_t j = 0; j < kOuts; ++j) ws[j] = weight.row(std::min(j, tile_outs - 1));
    // What comes next is fetched meanwhile, a share with each tile: rows are too short for the processor to foresee it.
    const std::size_t tiles = (rows + kTileRows - 1) / kTileRows, share = (kOuts * weight.row_bytes() + tiles - 1) / tiles;
    const std::uint8_t *next = ws[tile_outs - 1].byte(0) + weight.row_bytes(),
                       *end = next + std::min(kOuts, outs - o - tile_outs) * weight.row_bytes();
    for (std::size_t r = 0; r < rows; r += kTileRows) {
      for (const std::uint8_t* stop = std::min(next + share, end); next < stop; next += kLine) hwy::Prefetch(next);
      const std::size_t tile_rows = std::min(kTileRows, rows - r);
      const float* xs[kTileRows];
      for (std::size_t i = 0; i < kTileRows; ++i) xs[i] = x + (r + std::min(i, tile_rows - 1)) * in;
      V sums[kTile];
      for (V& sum : sums) sum = hn::Zero(d);
      const auto add_column = [&](std::size_t k, auto may_read_on) HWY_ATTR {
        V w[kOuts];
        for (std::size_t j = 0; j < kOuts; ++j) w[j] = ws[j].template load<decltype(may_read_on)::value>(k, ws[j].group(k));
        for (std::size_t i = 0; i < kTileRows; ++i) {
          const V v = hn::LoadU(d, xs[i] + k);
          for (std::size_t j = 0; j < kOuts; ++j) sums[i * kOuts + j] = hn::MulAdd(v, w[j], sums[i * kOuts + j]);
        }
      };
      std::size_t k = 0;
      for (; k < open; k += lanes) add_column(k, std::true_type());
      for (; k < whole; k += lanes) add_column(k, std::false_type());
      sum_vectors<kTile>(sums);
      HWY_ALIGN float tile[kTile];
      hn::Store(sums[0], d, tile);
      for (std::size_t i = 0; i < tile_rows; ++i) {
        for (std::size_t j = 0; j < tile_outs; ++j) {
          float sum = tile[i * kOuts + j];
          for (k = whole; k < in; ++k) sum += xs[i][k] * ws[j].at(k);
          y[(r + i) * width + o + j] += sum;
        }
      }
    }
  }
}

// Weights of one tile, restored, serve all rows of x.
void multiply_restored(const float* x, std::size_t rows, std::size_t in, const StoredMatrix& weight, std::size_t outs, float* y,
                       std::size_t width) {
  constexpr std::size_t kOuts = kTile / kTileRows;
  std::vector<float> values(kOuts * in);
  for (std::size_t o = 0; o < outs; o += kOuts) {
    const std::size_t tile_outs = std::min(kOuts, outs - o);
    restore(weight, in, {o, tile_outs, 0, in}, values.data());
    FloatRows<float> restored(values.data(), in);
    multiply_tiles(x, rows, in, restored, tile_outs, y + o, width);
  }
}

void multiply_few_rows(const float* x, std::size_t rows, std::size_t in, const StoredMatrix& weight, std::size_t outs, float* y,
                       std::size_t width) {
  if (rows > kTileRows && weight.type != ElementType::kFloat32) return multiply_restored(x, rows, in, weight, outs, y, width);
  visit_rows(weight, in, [&](auto stored) {
    if (rows == 1) return multiply_stream<1>(x, in, stored, outs, y, width);
    if (rows == 2 && kTile > 1) return multiply_stream<std::min<std::size_t>(2, kTile)>(x, in, stored, outs, y, width);
    multiply_tiles(x, rows, in, stored, outs, y, width);
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace veloxquant
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace veloxquant {

HWY_EXPORT(multiply_few_rows);

namespace {

// Products are shared out as blocks of rows, which keep their part of x in the second-level cache while the weights pass by, and
// where these are few, of outputs too: for many threads, yet not so small that a product gets thin.  Weights that are restored on
// the way meet more rows at once.  Few rows have no copy of the weights to pay for, and take smaller blocks, of some ten
// microseconds.
constexpr std::size_t kRows = 256, kRowsOfRestored = 1024, kFewBlocks = 8, kFewestOutputs = 128, kBlocksOfFewRows = 32,
                      kFewestOutputsOfFewRows = 64;
static_assert(kFewestOutputs % kColumnStep == 0, "blocks of linear_backward are columns of the weight");

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

std::size_t round_up(std::size_t x, std::size_t step) {
  return (x + step - 1) / step * step;
}

std::vector<Block> blocks_of(std::span<const LinearMap> maps, std::size_t rows, std::size_t block_rows, bool few) {
  const std::size_t row_blocks = std::max<std::size_t>(1, (rows + block_rows - 1) / block_rows),
                    share = few ? kBlocksOfFewRows : (kFewBlocks + row_blocks - 1) / row_blocks;
  const std::size_t outputs = round_up((total_out(maps) + share - 1) / share, few ? kFewestOutputsOfFewRows : kFewestOutputs);
  std::vector<Block> blocks;
  for (std::size_t row = 0; row < rows; row += block_rows) {
    std::size_t column = 0;
    for (const auto& map : maps) {
      for (std::size_t output = 0; output < map.out; output += outputs)
        blocks.push_back({&map, row, std::min(block_rows, rows - row), output, std::min(outputs, map.out - output), column});
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

// A piece of a weight as restored for BLAS: it stays in the third-level cache, and has enough columns and rows that BLAS's copies
// of what it is multiplied by do not count.
constexpr std::size_t kPanelSize = 1 << 19, kPanelColumns = 1024;
static_assert(kPanelColumns % kColumnStep == 0);

const float* restored(const StoredMatrix& weight, std::size_t columns, const MatrixPart& part) {
  thread_local std::vector<float> panel;
  panel.resize(std::max(panel.size(), part.rows * part.columns));
  restore(weight, columns, part, panel.data());
  return panel.data();
}

void multiply(bool transposed, std::size_t m, std::size_t n, std::size_t k, const float* a, std::size_t lda, const float* b,
              std::size_t ldb, bool add, float* c, std::size_t ldc) {
  const auto size = [](std::size_t x) { return static_cast<int>(x); };
  gemm(false, transposed, size(m), size(n), size(k), 1.0f, a, size(lda), b, size(ldb), add ? 1.0f : 0.0f, c, size(ldc));
}

// visit(row, rows) for blocks of rows, which keep their part of x in the second-level cache.
template <class Visit>
void for_row_blocks(std::size_t rows, Visit visit) {
  for (std::size_t row = 0; row < rows; row += kRows) visit(row, std::min(kRows, rows - row));
}

// y [rows, outs], `width` apart, = x [rows, in] · weight [outs, in] transposed; added to y where asked for.
void multiply_many_rows(const float* x, std::size_t rows, std::size_t in, const StoredMatrix& weight, std::size_t outs, bool add,
                        float* y, std::size_t width) {
  if (weight.type == ElementType::kFloat32)
    return multiply(true, rows, outs, in, x, in, static_cast<const float*>(weight.values), in, add, y, width);
  const std::size_t columns = std::min(in, kPanelColumns), panel_outs = std::min(outs, kPanelSize / columns);
  for (std::size_t o = 0; o < outs; o += panel_outs) {
    for (std::size_t k = 0; k < in; k += columns) {
      const MatrixPart part{o, std::min(panel_outs, outs - o), k, std::min(columns, in - k)};
      const float* panel = restored(weight, in, part);
      for_row_blocks(rows, [&](std::size_t row, std::size_t count) {
        multiply(true, count, part.rows, part.columns, x + row * in + k, in, panel, part.columns, add || k > 0, y + row * width + o,
                 width);
      });
    }
  }
}

// grad_x [rows, columns], `in` apart, = grad_y [rows, outs], `width` apart, · columns from `column` on of weight [outs, in]; added
// to grad_x where asked for.
void multiply_back(const float* grad_y, std::size_t rows, std::size_t width, const StoredMatrix& weight, std::size_t outs,
                   std::size_t in, std::size_t column, std::size_t columns, bool add, float* grad_x) {
  if (weight.type == ElementType::kFloat32)
    return multiply(false, rows, columns, outs, grad_y, width, static_cast<const float*>(weight.values) + column, in, add, grad_x,
                    in);
  const std::size_t panel_outs = std::min(outs, std::max<std::size_t>(1, kPanelSize / columns));
  for (std::size_t o = 0; o < outs; o += panel_outs) {
    const MatrixPart part{o, std::min(panel_outs, outs - o), column, columns};
    const float* panel = restored(weight, in, part);
    for_row_blocks(rows, [&](std::size_t row, std::size_t count) {
      multiply(false, count, columns, part.rows, grad_y + row * width + o, width, panel, columns, add || o > 0, grad_x + row * in,
               in);
    });
  }
}

std::size_t rows_of_block(std::span<const LinearMap> maps) {
  const auto in_float32 = [](const LinearMap& map) { return map.weight.type == ElementType::kFloat32; };
  return std::all_of(maps.begin(), maps.end(), in_float32) ? kRows : kRowsOfRestored;
}

void check(std::span<const LinearMap> maps, std::size_t in) {
  for (const auto& map : maps) map.weight.check("linear", in);
}

}  // namespace

void linear(const float* x, std::size_t rows, std::size_t in, std::span<const LinearMap> maps, const float* residual, float* y) {
  check(maps, in);
  const std::size_t width = total_out(maps);
  const auto blocks = blocks_of(maps, rows, rows_of_block(maps), rows < kFewestForGemm);
  parallel_for(blocks.size(), 1, [&](std::size_t i, std::size_t) {
    const Block& block = blocks[i];
    const std::size_t at = block.row * width + block.column + block.output;
    const float* rows_of_x = x + block.row * in;
    const StoredMatrix weight = block.map->weight.from_row(block.output, in);
    const bool few = block.rows < kFewestForGemm, added = few || residual || block.map->bias;
    if (added) start_rows(block, width, residual ? residual + at : nullptr, y + at);
    if (few) return HWY_DYNAMIC_DISPATCH(multiply_few_rows)(rows_of_x, block.rows, in, weight, block.outputs, y + at, width);
    multiply_many_rows(rows_of_x, block.rows, in, weight, block.outputs, added, y + at, width);
  });
}

void linear_backward(const float* grad_y, std::size_t rows, std::size_t in, std::span<const LinearMap> maps, float* grad_x) {
  check(maps, in);
  const std::size_t width = total_out(maps);
  // Here the inputs are what a product puts out.
  const LinearMap inputs{{}, nullptr, in};
  const auto blocks = blocks_of({&inputs, 1}, rows, rows_of_block(maps), false);
  parallel_for(blocks.size(), 1, [&](std::size_t i, std::size_t) {
    const Block& block = blocks[i];
    const float* gained = grad_y + block.row * width;
    float* out = grad_x + block.row * in + block.output;
    bool add = false;
    for (const auto& map : maps) {
      multiply_back(gained, block.rows, width, map.weight, map.out, in, block.output, block.outputs, add, out);
      gained += map.out;
      add = true;
    }
  });
}

}  // namespace veloxquant
#endif
