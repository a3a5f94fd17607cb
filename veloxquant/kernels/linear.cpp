#include "veloxquant/kernels/linear.h"

#include <algorithm>
#include <vector>

#include "veloxquant/core/parallel.h"
#include "veloxquant/kernels/gemm.h"

namespace veloxquant {
namespace {

// Products are shared out as blocks of rows or, where rows are few, of outputs.  A block of rows keeps its part of x in the
// second-level cache while the weights pass by; fewer rows make the product too thin.
constexpr std::size_t kRows = 256, kFewRows = 128, kOutputs = 128;

struct Block {
  const LinearMap* map;
  std::size_t row, rows;        // of x
  std::size_t output, outputs;  // of the map
  std::size_t column;           // of y, where the map's outputs begin
};

std::vector<Block> blocks_of(std::span<const LinearMap> maps, std::size_t rows) {
  const std::size_t row_step = rows < 2 * kFewRows ? rows : std::min(kRows, (rows + 1) / 2);
  std::vector<Block> blocks;
  for (std::size_t row = 0; row < rows; row += row_step) {
    std::size_t column = 0;
    for (const auto& map : maps) {
      const std::size_t step = row_step < kFewRows ? kOutputs : map.out;
      for (std::size_t output = 0; output < map.out; output += step)
        blocks.push_back({&map, row, std::min(row_step, rows - row), output, std::min(step, map.out - output), column});
      column += map.out;
    }
  }
  return blocks;
}

std::size_t total_out(std::span<const LinearMap> maps) {
  std::size_t total = 0;
  for (const auto& map : maps) total += map.out;
  return total;
}

// What y holds before the product is added to it; false if that is nothing.
bool start_rows(const Block& block, std::size_t width, const float* residual, float* y) {
  const float* bias = block.map->bias ? block.map->bias + block.output : nullptr;
  if (!bias && !residual) return false;
  for (std::size_t r = 0; r < block.rows; ++r, y += width) {
    if (!residual) {
      std::copy_n(bias, block.outputs, y);
      continue;
    }
    std::copy_n(residual, block.outputs, y);
    residual += width;
    if (bias) std::transform(y, y + block.outputs, bias, y, [](float a, float b) { return a + b; });
  }
  return true;
}

}  // namespace

void linear(const float* x, std::size_t rows, std::size_t in, std::span<const LinearMap> maps, const float* residual, float* y) {
  const std::size_t width = total_out(maps);
  const auto blocks = blocks_of(maps, rows);
  parallel_for(blocks.size(), 1, [&](std::size_t i, std::size_t) {
    const Block& block = blocks[i];
    const std::size_t at = block.row * width + block.column + block.output;
    const bool started = start_rows(block, width, residual ? residual + at : nullptr, y + at);
    gemm(false, true, static_cast<int>(block.rows), static_cast<int>(block.outputs), static_cast<int>(in), 1.0f, x + block.row * in,
         static_cast<int>(in), block.map->weight + block.output * in, static_cast<int>(in), started ? 1.0f : 0.0f, y + at,
         static_cast<int>(width));
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
