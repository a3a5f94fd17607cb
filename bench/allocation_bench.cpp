// The exact allocation at the size of the largest models: 126 layers · 8 heads · 2 sides, bytes at 131,072 tokens.
#include <benchmark/benchmark.h>

#include <cmath>

#include "veloxquant/core/random.h"
#include "veloxquant/plan/allocation.h"

namespace veloxquant {
namespace {

constexpr std::size_t kUnits = 2016;

std::vector<AllocationOption> ladder(Random& random, std::size_t options) {
  constexpr std::uint64_t kBytes = std::uint64_t{131072} * 256;
  std::vector<AllocationOption> result(options);
  const double scale = std::exp(2 * random.normal());
  for (auto& [cost, distortion] : result) {
    cost = static_cast<std::int64_t>(random.below(kBytes));
    distortion = scale * std::exp(-8 * static_cast<double>(cost) / kBytes + 0.7 * random.normal());
  }
  return result;
}

void run(benchmark::State& state, const std::vector<std::vector<AllocationOption>>& units) {
  const auto frontier = allocation_frontier(units);
  for (auto _ : state) benchmark::DoNotOptimize(allocate(units, (frontier.front().cost + frontier.back().cost) / 2));
}

void units_that_differ(benchmark::State& state) {
  Random random(1);
  std::vector<std::vector<AllocationOption>> units;
  for (std::size_t u = 0; u < kUnits; ++u) units.push_back(ladder(random, static_cast<std::size_t>(state.range(0))));
  run(state, units);
}

void units_alike(benchmark::State& state) {
  Random random(1);
  run(state, {kUnits, ladder(random, static_cast<std::size_t>(state.range(0)))});
}

BENCHMARK(units_that_differ)->Arg(11)->Arg(40)->Unit(benchmark::kMillisecond);
BENCHMARK(units_alike)->Arg(11)->Arg(40)->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace veloxquant

BENCHMARK_MAIN();
