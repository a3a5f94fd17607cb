// What the benchmarks share: the matrix product that they are compared with, and how work is said.
#pragma once

#include <benchmark/benchmark.h>
#include <hwy/targets.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string_view>
#include <vector>

extern "C" void cblas_sgemm(int order, int transpose_a, int transpose_b, int m, int n, int k, float alpha, const float* a, int lda,
                            const float* b, int ldb, float beta, float* c, int ldc);

namespace veloxquant {

/// VELOXQUANT_BENCH_TARGET, such as AVX2, names the instruction set that our kernels are to use instead of the best.  False, and
/// says so, where this machine lacks it.
inline bool choose_target() {
  const char* name = std::getenv("VELOXQUANT_BENCH_TARGET");
  if (!name) return true;
  for (const std::int64_t target : hwy::SupportedAndGeneratedTargets()) {
    if (std::string_view(name) != hwy::TargetName(target)) continue;
    hwy::SetSupportedTargetsForTest(target);
    return true;
  }
  std::fprintf(stderr, "VELOXQUANT_BENCH_TARGET: this machine has no %s\n", name);
  return false;
}

inline void say_flops(benchmark::State& state, double flops) {
  state.counters["flops"] = flops;
  state.counters["FLOP/s"] = benchmark::Counter(flops, benchmark::Counter::kIsIterationInvariantRate, benchmark::Counter::kIs1000);
}

/// [rows, in] · [in, out] on all threads.
inline void bench_sgemm(benchmark::State& state, int rows, int in, int out) {
  constexpr int kRowMajor = 101, kNoTranspose = 111;
  const auto r = static_cast<std::size_t>(rows), i = static_cast<std::size_t>(in), o = static_cast<std::size_t>(out);
  const std::vector<float> a(r * i, 0.5f), b(i * o, 0.25f);
  std::vector<float> c(r * o);
  for (auto _ : state)
    cblas_sgemm(kRowMajor, kNoTranspose, kNoTranspose, rows, out, in, 1.0f, a.data(), in, b.data(), out, 0.0f, c.data(), out);
  say_flops(state, 2.0 * rows * in * out);
}

}  // namespace veloxquant
