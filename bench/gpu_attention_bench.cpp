// Attention over codes on a GPU, whole calls through MLX: one token against a long context, beside MLX's own attention in bfloat16.
#include <benchmark/benchmark.h>

#include <map>
#include <memory>
#include <utility>

#include "mlx/fast.h"
#include "mlx/ops.h"
#include "mlx/random.h"
#include "mlx/transforms.h"
#include "veloxquant/cache/packed_arrays.h"
#include "veloxquant/plan/plan.h"
#include "veloxquant/quantize/rotated_pq.h"

namespace veloxquant {
namespace {

constexpr int kHeads = 32, kKvHeads = 8, kDim = 128;

mx::array normal(const mx::Shape& shape, std::uint64_t seed, mx::Dtype type = mx::float32) {
  auto x = mx::random::normal(shape, type, mx::random::key(seed));
  x.eval();
  return x;
}

// 2 bits of codes, 1.2 % of the tokens patched, window and sinks as by default.
std::shared_ptr<const PackedArraysLayer> layer() {
  static const auto made = [] {
    const DeviceScope cpu(mx::Device::cpu);
    const auto x = normal({16384, kDim}, 1);
    const auto fit = [&](Side side, Rotation rotation) {
      return RotatedPqFitter({x.data<float>(), x.size()}, kDim, {}, rotation)
          .fit(side, {.codes = kDim / 4, .stages = 2, .patches = 3, .max_iter = 2});
    };
    const auto copies = [&](const QuantizerParameters& unit) { return std::vector(std::size_t{kKvHeads}, unit); };
    return std::make_shared<const PackedArraysLayer>(copies(fit(Side::kKeys, Rotation::kPlane)),
                                                     copies(fit(Side::kValues, Rotation::kFull)), kDefaultWindow, kDefaultSinks);
  }();
  return made;
}

constexpr float kScale = 0.09f;

const Rope& rope() {
  static const Rope made(RopeConfig{}, kDim);
  return made;
}

// A context filled in chunks: only what is stored is evaluated, not what attention over it gives.
PackedArrays& filled(int tokens, int batch) {
  static std::map<std::pair<int, int>, PackedArrays> caches;
  const auto [found, fresh] = caches.try_emplace({tokens, batch}, layer());
  constexpr int kStep = 2048;
  const auto some = normal({batch, kKvHeads, kStep, kDim}, 2);
  for (int at = 0; fresh && at < tokens; at += kStep) {
    const auto answer = found->second.attend(some, some, some, {.scale = kScale, .rope = &rope()});
    mx::eval(found->second.pending());
  }
  return found->second;
}

// Each step appends a token as well.
void packed(benchmark::State& state) {
  const int tokens = static_cast<int>(state.range(0)), batch = static_cast<int>(state.range(1));
  auto& cache = filled(tokens, batch);
  const AttentionSpec spec{.scale = kScale, .rope = &rope()};
  const auto q = normal({batch, kHeads, 1, kDim}, 1), k = normal({batch, kKvHeads, 1, kDim}, 2),
             v = normal({batch, kKvHeads, 1, kDim}, 3);
  cache.attend(q, k, v, spec).eval();  // kernels are compiled
  for (auto _ : state) cache.attend(q, k, v, spec).eval();
}

void mlx_attention(benchmark::State& state) {
  const int tokens = static_cast<int>(state.range(0)), batch = static_cast<int>(state.range(1));
  const auto q = normal({batch, kHeads, 1, kDim}, 1, mx::bfloat16), k = normal({batch, kKvHeads, tokens, kDim}, 2, mx::bfloat16),
             v = normal({batch, kKvHeads, tokens, kDim}, 3, mx::bfloat16);
  mx::fast::scaled_dot_product_attention(q, k, v, kScale).eval();
  for (auto _ : state) mx::fast::scaled_dot_product_attention(q, k, v, kScale).eval();
}

#define VELOXQUANT_SHAPES ->Args({32768, 1})->Args({131072, 1})->Args({32768, 8})->Unit(benchmark::kMillisecond)->UseRealTime()
BENCHMARK(packed) VELOXQUANT_SHAPES;
BENCHMARK(mlx_attention) VELOXQUANT_SHAPES;

}  // namespace
}  // namespace veloxquant

int main(int argc, char** argv) {
  using namespace veloxquant;
  if (!mx::is_available(mx::Device::gpu)) return 0;
  mx::set_default_device(mx::Device::gpu);
  benchmark::Initialize(&argc, argv);
  benchmark::RunSpecifiedBenchmarks();
}
