// Speed of the CPU kernels behind product quantisation, beside the matrix product of the same machine.
// nearest_centroid counts 2·dim a point and centroid.
#include <benchmark/benchmark.h>

#include <cstdint>
#include <vector>

#include "veloxquant/core/parallel.h"
#include "veloxquant/core/random.h"
#include "veloxquant/kernels/hadamard.h"
#include "veloxquant/kernels/nearest_centroid.h"
#include "veloxquant/quantize/kmeans.h"

extern "C" void cblas_sgemm(int order, int transpose_a, int transpose_b, int m, int n, int k, float alpha, const float* a, int lda,
                            const float* b, int ldb, float beta, float* c, int ldc);

namespace veloxquant {
namespace {

std::vector<float> normal_values(std::size_t count) {
  Random random(1);
  std::vector<float> values(count);
  for (auto& value : values) value = static_cast<float>(random.normal());
  return values;
}

void count_flops(benchmark::State& state, double flops) {
  state.counters["FLOP/s"] = benchmark::Counter(flops, benchmark::Counter::kIsIterationInvariantRate, benchmark::Counter::kIs1000);
}

void sgemm(benchmark::State& state) {
  constexpr int kRowMajor = 101, kNoTranspose = 111, kSize = 1024;
  const auto a = normal_values(kSize * kSize), b = a;
  std::vector<float> c(a.size());
  for (auto _ : state)
    cblas_sgemm(kRowMajor, kNoTranspose, kNoTranspose, kSize, kSize, kSize, 1.0f, a.data(), kSize, b.data(), kSize, 0.0f, c.data(),
                kSize);
  count_flops(state, 2.0 * kSize * kSize * kSize);
}

// Vectors of range(0) channels in range(1) sub-spaces of range(2) centroids.
void nearest_centroid(benchmark::State& state) {
  const auto dim = static_cast<std::size_t>(state.range(0)), subspaces = static_cast<std::size_t>(state.range(1));
  const auto count = static_cast<std::size_t>(state.range(2)), width = dim / subspaces;
  constexpr std::size_t kRows = 8192, kBlock = 512;
  const auto vectors = normal_values(kRows * dim), codebook = normal_values(subspaces * count * width);
  std::vector<NearestCentroid> nearest;
  for (std::size_t s = 0; s < subspaces; ++s)
    nearest.emplace_back(std::span(codebook).subspan(s * count * width, count * width), count, width);
  std::vector<std::uint16_t> codes(kRows * subspaces);
  for (auto _ : state) {
    parallel_for(kRows, kBlock, [&](std::size_t begin, std::size_t end) {
      for (std::size_t s = 0; s < subspaces; ++s)
        nearest[s](vectors.data() + begin * dim + s * width, end - begin, dim, codes.data() + begin * subspaces + s, subspaces,
                   nullptr);
    });
  }
  count_flops(state, 2.0 * kRows * static_cast<double>(dim * count));
}

void product_codebook(benchmark::State& state) {
  const int dim = static_cast<int>(state.range(0)), subspaces = static_cast<int>(state.range(1));
  const auto vectors = normal_values(16384 * static_cast<std::size_t>(dim));
  for (auto _ : state)
    benchmark::DoNotOptimize(train_product_codebook(vectors, dim, subspaces, {.num_centroids = 256, .max_iter = 25}));
}

void hadamard_rows(benchmark::State& state) {
  const auto dim = static_cast<std::size_t>(state.range(0));
  constexpr std::size_t kRows = 16384;
  auto rows = normal_values(kRows * dim);
  for (auto _ : state) hadamard(rows.data(), kRows, dim);
  state.SetBytesProcessed(static_cast<std::int64_t>(state.iterations() * rows.size() * sizeof(float) * 2));
}

BENCHMARK(sgemm)->UseRealTime();
BENCHMARK(nearest_centroid)
    ->UseRealTime()
    ->Args({64, 16, 256})
    ->Args({128, 32, 256})
    ->Args({128, 64, 256})
    ->Args({128, 16, 256})
    ->Args({128, 8, 256})
    ->Args({128, 4, 4096});
BENCHMARK(product_codebook)->UseRealTime()->Unit(benchmark::kMillisecond)->Args({64, 16})->Args({128, 32});
BENCHMARK(hadamard_rows)->UseRealTime()->Arg(64)->Arg(128);

}  // namespace
}  // namespace veloxquant

BENCHMARK_MAIN();
