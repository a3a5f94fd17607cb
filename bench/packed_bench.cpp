// Attention over codes: one query a head against a long context, beside the memory's limit and MLX's own attention.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <tuple>

#include "bench/common.h"
#include "mlx/fast.h"
#include "mlx/ops.h"
#include "mlx/random.h"
#include "mlx/transforms.h"
#include "veloxquant/cache/packed_cache.h"
#include "veloxquant/core/parallel.h"
#include "veloxquant/core/random.h"
#include "veloxquant/kernels/lut_scan.h"
#include "veloxquant/quantize/rotated_pq.h"
#include "veloxquant/quantize/vecinfer.h"

namespace veloxquant {
namespace {

constexpr int kTokens = 32768;

mx::array normal(const mx::Shape& shape, std::uint64_t seed) {
  auto x = mx::random::normal(shape, mx::float32, mx::random::key(seed));
  x.eval();
  return x;
}

struct Shape {
  int heads, kv_heads, dim;
};

Shape shape_of(const benchmark::State& state) {
  return {static_cast<int>(state.range(0)), static_cast<int>(state.range(1)), static_cast<int>(state.range(2))};
}

// 2 bits of codes, 1.2 % of the tokens patched, window and sinks as by default.
std::unique_ptr<PackedCache> filled(const Shape& shape, Rotation rotation, const AttentionSpec& spec) {
  const auto x = normal({16384, shape.dim}, 1);
  const auto fit = [&](Side side, Rotation how) {
    return RotatedPqFitter({x.data<float>(), x.size()}, shape.dim, {}, how)
        .fit(side, {.codes = shape.dim / 4, .stages = 2, .patches = 3, .max_iter = 2});
  };
  const auto copies = [&](const QuantizerParameters& unit) { return std::vector(static_cast<std::size_t>(shape.kv_heads), unit); };
  auto cache = std::make_unique<PackedCache>(std::make_shared<PackedLayer>(
      copies(fit(Side::kKeys, rotation)), copies(fit(Side::kValues, Rotation::kFull)), kDefaultWindow, kDefaultSinks));
  constexpr int kStep = 512;
  for (int at = 0; at < kTokens; at += kStep)
    cache
        ->attend(normal({1, shape.kv_heads, kStep, shape.dim}, 2),
                 normal({1, shape.kv_heads, kStep, shape.dim}, 3 + static_cast<unsigned>(at)),
                 normal({1, shape.kv_heads, kStep, shape.dim}, 4 + static_cast<unsigned>(at)), spec)
        .eval();
  return cache;
}

void decode(benchmark::State& state) {
  const Shape shape = shape_of(state);
  const Rotation rotation = state.range(3) == 1 ? Rotation::kPlane : Rotation::kFull;
  static std::map<std::tuple<int, int, int>, std::unique_ptr<PackedCache>> caches;
  static std::map<int, Rope> ropes;
  const AttentionSpec spec{.scale = 0.1f, .rope = &ropes.try_emplace(shape.dim, RopeConfig{}, shape.dim).first->second};
  auto& cache = caches[{shape.kv_heads, shape.dim, static_cast<int>(rotation)}];
  if (!cache) cache = filled(shape, rotation, spec);
  const auto q = normal({1, shape.heads, 1, shape.dim}, 1), k = normal({1, shape.kv_heads, 1, shape.dim}, 2),
             v = normal({1, shape.kv_heads, 1, shape.dim}, 3);
  for (auto _ : state) cache->attend(q, k, v, spec).eval();
}

// All threads read an array far larger than the caches.  bytes: what keys and values of fp16 would take.
void read_fp16(benchmark::State& state) {
  const Shape shape = shape_of(state);
  static const std::vector<std::uint64_t> memory(std::size_t{1} << 27, 1);
  const auto threads = static_cast<std::size_t>(num_threads());
  for (auto _ : state) {
    std::vector<std::uint64_t> sums(threads * 8);
    parallel_for(threads, 1, [&](std::size_t part, std::size_t) {
      const auto* from = memory.data() + memory.size() / threads * part;
      std::uint64_t a = 0, b = 0, c = 0, d = 0;
      for (std::size_t i = 0; i + 4 <= memory.size() / threads; i += 4)
        a += from[i], b += from[i + 1], c += from[i + 2], d += from[i + 3];
      sums[part * 8] = a + b + c + d;
    });
    benchmark::DoNotOptimize(sums.data());
  }
  state.counters["bytes"] = 2.0 * kTokens * shape.kv_heads * shape.dim * 2;
  state.counters["read"] = static_cast<double>(memory.size() * sizeof(std::uint64_t));
}

void mlx_attention(benchmark::State& state) {
  const Shape shape = shape_of(state);
  const auto q = normal({1, shape.heads, 1, shape.dim}, 1), k = normal({1, shape.kv_heads, kTokens, shape.dim}, 2),
             v = normal({1, shape.kv_heads, kTokens, shape.dim}, 3);
  for (auto _ : state) mx::fast::scaled_dot_product_attention(q, k, v, 0.1f).eval();
}

// One query, one thread, keys of 64 dimensions in 16 codes of range(0) bits: its tables, and the scan of blocks of codes.
// `error`: rms of the scores, in parts of their range.
void scan(benchmark::State& state) {
  constexpr std::size_t kKeys = std::size_t{1} << 20, kCodes = 16, kDim = 64;
  const bool bytes = state.range(0) == 8;
  const std::size_t centroids = bytes ? 256 : 16, block_bytes = (bytes ? kCodes : kCodes / 2) * kPackedBlockTokens;
  const auto random = normal({static_cast<int>(centroids * kDim)}, 1), q = normal({static_cast<int>(kDim)}, 2);
  const ProductCodebook codebook(Tensor{{static_cast<int>(kCodes), static_cast<int>(centroids), static_cast<int>(kDim / kCodes)},
                                        {random.data<float>(), random.data<float>() + random.size()}});
  std::vector<std::uint8_t> codes(kKeys / kPackedBlockTokens * block_bytes);
  Random codes_of(3);
  for (auto& byte : codes) byte = static_cast<std::uint8_t>(codes_of.below(256));
  std::vector<float> products(kCodes * centroids), scores(kPackedBlockTokens), exact(kKeys);
  ScanTables tables;
  const auto each_block = [&](const auto& scan_block) {
    for (std::size_t t = 0, at = 0; t < kKeys; t += kPackedBlockTokens, at += block_bytes)
      scan_block(ScanCodes{codes.data() + at, kPackedBlockTokens, kPackedBlockTokens}, t);
  };
  for (auto _ : state) {
    codebook.query_tables({q.data<float>(), kDim}, products);
    make_scan_tables(products.data(), kCodes, centroids, tables);
    each_block([&](const ScanCodes& some, std::size_t) {
      (bytes ? scan_bytes : scan_nibbles)(tables, some, 1.0f, scores.data());
      benchmark::DoNotOptimize(scores.data());
    });
  }
  double sum = 0;
  each_block([&](const ScanCodes& some, std::size_t t) {
    (bytes ? scan_bytes : scan_nibbles)(tables, some, 1.0f, scores.data());
    (bytes ? reference::scan_bytes : reference::scan_nibbles)(products.data(), kCodes, some, 1.0f, &exact[t]);
    for (std::size_t i = 0; i < kPackedBlockTokens; ++i) sum += std::pow(scores[i] - exact[t + i], 2);
  });
  const auto [least, most] = std::minmax_element(exact.begin(), exact.end());
  state.counters["error"] = std::sqrt(sum / kKeys) / (*most - *least);
  state.counters["keys"] = kKeys;
}

// As mlx_lm.models.base.quantized_scaled_dot_product_attention composes it, of keys and values in 4 bits and groups of 64.
void mlx_quantized_attention(benchmark::State& state) {
  const Shape shape = shape_of(state);
  const int repeats = shape.heads / shape.kv_heads;
  const auto quantized = [&](std::uint64_t seed) {
    auto parts = mx::quantize(normal({1, shape.kv_heads, kTokens, shape.dim}, seed), 64, 4);
    for (auto& part : parts) part = mx::expand_dims(part, -3);
    mx::eval(parts);
    return parts;
  };
  const auto k = quantized(2), v = quantized(3);
  const auto q = normal({1, shape.heads, 1, shape.dim}, 1);
  const auto product = [](const mx::array& x, const std::vector<mx::array>& w, bool transpose) {
    return mx::quantized_matmul(x, w[0], w[1], w[2], transpose, 64, 4);
  };
  for (auto _ : state) {
    const auto scaled = mx::reshape(mx::multiply(q, mx::array(0.1f)), {1, shape.kv_heads, repeats, 1, shape.dim});
    product(mx::softmax(product(scaled, k, true), -1, true), v, false).eval();
  }
}

BENCHMARK(scan)->Arg(8)->Arg(4)->Unit(benchmark::kMillisecond)->MeasureProcessCPUTime()->UseRealTime();
BENCHMARK(decode)
    ->Args({4, 2, 64, 1})
    ->Args({4, 2, 64, 0})
    ->Args({32, 8, 128, 1})
    ->Unit(benchmark::kMillisecond)
    ->MeasureProcessCPUTime()
    ->UseRealTime();
BENCHMARK(read_fp16)->Args({4, 2, 64})->Args({32, 8, 128})->Unit(benchmark::kMillisecond)->MeasureProcessCPUTime()->UseRealTime();
BENCHMARK(mlx_attention)
    ->Args({4, 2, 64})
    ->Args({32, 8, 128})
    ->Unit(benchmark::kMillisecond)
    ->MeasureProcessCPUTime()
    ->UseRealTime();
BENCHMARK(mlx_quantized_attention)
    ->Args({4, 2, 64})
    ->Args({32, 8, 128})
    ->Unit(benchmark::kMillisecond)
    ->MeasureProcessCPUTime()
    ->UseRealTime();

}  // namespace
}  // namespace veloxquant

int main(int argc, char** argv) {
  if (!veloxquant::choose_target()) return 2;
  veloxquant::mx::set_default_device(veloxquant::mx::Device::cpu);
  benchmark::Initialize(&argc, argv);
  benchmark::RunSpecifiedBenchmarks();
}
