// Speed of the CPU kernels behind product quantisation, beside the matrix product of the same machine.
// Encoding and training count 2·dim a vector and centroid of each sub-space.
#include <cmath>
#include <cstdint>
#include <vector>

#include "bench/common.h"
#include "veloxquant/core/parallel.h"
#include "veloxquant/core/random.h"
#include "veloxquant/kernels/hadamard.h"
#include "veloxquant/quantize/kmeans.h"
#include "veloxquant/quantize/vecinfer.h"

namespace veloxquant {
namespace {

std::vector<float> normal_values(std::size_t count) {
  Random random(1);
  std::vector<float> values(count);
  for (auto& value : values) value = static_cast<float>(random.normal());
  return values;
}

// Rows of channels whose deviations fall from 2 to 1/2, and which come from two neighbours each, as keys' do: what peers.py makes
// from the same numbers.
std::vector<float> correlated_values(std::size_t rows, std::size_t dim) {
  auto values = normal_values(rows * dim);
  for (std::size_t r = 0; r < rows; ++r) {
    float* row = values.data() + r * dim;
    for (std::size_t i = dim; i-- > 1;)
      row[i] = (0.8f * row[i] + 0.6f * row[i - 1]) * std::exp2(1.0f - 2.0f * static_cast<float>(i) / static_cast<float>(dim));
  }
  return values;
}

void sgemm(benchmark::State& state) {
  bench_sgemm(state, 1024, 1024, 1024);
}

// On range(0) threads.
void sgemm_on(benchmark::State& state) {
  const int before = num_threads();
  set_num_threads(static_cast<int>(state.range(0)));
  bench_sgemm(state, 1024, 1024, 1024);
  set_num_threads(before);
}

// Vectors of range(0) channels in range(1) sub-spaces of range(2) centroids.
void encode(benchmark::State& state) {
  const int dim = static_cast<int>(state.range(0)), subspaces = static_cast<int>(state.range(1)),
            centroids = static_cast<int>(state.range(2));
  constexpr std::size_t kRows = 32768;
  const auto vectors = normal_values(kRows * static_cast<std::size_t>(dim));
  const auto size = static_cast<std::size_t>(centroids) * static_cast<std::size_t>(dim);
  const ProductCodebook codebook(Tensor{{subspaces, centroids, dim / subspaces}, normal_values(size)});
  std::vector<std::uint16_t> codes(kRows * static_cast<std::size_t>(subspaces));
  for (auto _ : state) codebook.encode(vectors, codes);
  say_flops(state, 2.0 * kRows * static_cast<double>(size));
}

// The training of a product quantiser of 16 sub-spaces of 256 centroids on 32,768 vectors of 64 channels with unlike variances, 25
// iterations.  `error` is the mean squared error of a vector.
void train_codebook(benchmark::State& state) {
  constexpr int kDim = 64, kSubspaces = 16, kIterations = 25;
  constexpr std::size_t kRows = 32768;
  const auto vectors = correlated_values(kRows, kDim);
  Tensor codebook;
  for (auto _ : state)
    codebook = train_product_codebook(vectors, kDim, kSubspaces, {.num_centroids = 256, .max_iter = kIterations});
  const ProductCodebook quantizer(codebook);
  std::vector<std::uint16_t> codes(kRows * kSubspaces);
  std::vector<float> decoded(vectors.size());
  quantizer.encode(vectors, codes);
  quantizer.decode(codes, decoded);
  double error = 0;
  for (std::size_t i = 0; i < vectors.size(); ++i) error += (vectors[i] - decoded[i]) * (vectors[i] - decoded[i]);
  state.counters["error"] = error / kRows;
  say_flops(state, 2.0 * kRows * kDim * 256 * kIterations);
}

void hadamard_rows(benchmark::State& state) {
  const auto dim = static_cast<std::size_t>(state.range(0));
  constexpr std::size_t kRows = 16384;
  auto rows = normal_values(kRows * dim);
  for (auto _ : state) hadamard(rows.data(), kRows, dim);
  state.SetBytesProcessed(static_cast<std::int64_t>(state.iterations() * rows.size() * sizeof(float) * 2));
}

BENCHMARK(sgemm)->UseRealTime();
BENCHMARK(sgemm_on)->UseRealTime()->Arg(1)->Arg(2);
BENCHMARK(encode)
    ->UseRealTime()
    ->Args({64, 16, 256})
    ->Args({128, 32, 256})
    ->Args({128, 64, 256})
    ->Args({128, 16, 256})
    ->Args({128, 4, 4096});
BENCHMARK(train_codebook)->UseRealTime()->Unit(benchmark::kMillisecond);
BENCHMARK(hadamard_rows)->UseRealTime()->Arg(64)->Arg(128);

}  // namespace
}  // namespace veloxquant

int main(int argc, char** argv) {
  if (!veloxquant::choose_target()) return 2;
  benchmark::Initialize(&argc, argv);
  benchmark::RunSpecifiedBenchmarks();
}
