// Speed of the engine on a model folder.  usage: engine_bench MODEL [Google Benchmark's options]
// Every benchmark says the floating-point operations of its work, and sgemm what the machine makes of them.
#include <cstdio>

#include "bench/common.h"
#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "veloxquant/calibrate/gradients.h"
#include "veloxquant/calibrate/observe.h"
#include "veloxquant/calibrate/sensitivity.h"
#include "veloxquant/core/random.h"
#include "veloxquant/generate/own_text.h"
#include "veloxquant/model/attention.h"
#include "veloxquant/model/divergence.h"
#include "veloxquant/model/model.h"

namespace veloxquant {
namespace {

constexpr int kTokens = 2048;

// Multiplications and additions of a forward pass over `tokens` tokens, of causal attention the half that is not masked.
double forward_flops(const ModelConfig& c, double tokens) {
  const double heads = c.num_heads * c.head_dim, kv = c.num_kv_heads * c.head_dim;
  const double maps = c.hidden_size * (2 * heads + 2 * kv + 3.0 * c.intermediate_size), attention = 2 * heads * (tokens + 1) / 2;
  return 2 * tokens * (c.num_layers * (maps + attention) + static_cast<double>(c.hidden_size) * c.vocab_size);
}

TokenBatch random_tokens(const Model& model, int count, int length) {
  TokenBatch batch(count, length);
  Random random(1);
  for (auto& token : batch.tokens)
    token = static_cast<std::int32_t>(random.below(static_cast<std::uint64_t>(model.config().vocab_size)));
  return batch;
}

void forward(benchmark::State& state, const Model& model) {
  const auto tokens = token_array(random_tokens(model, 1, kTokens), 0, 1);
  for (auto _ : state) mx::eval(model.logits(model.forward(tokens, model.make_caches(FullCache::factory()))));
  say_flops(state, forward_flops(model.config(), kTokens));
}

void forward_and_backward(benchmark::State& state, const Model& model) {
  const auto tokens = random_tokens(model, 1, kTokens);
  for (auto _ : state)
    likelihood_gradients(model, tokens, {.window = 32, .weights = {}, .seed = 1},
                         [](const LayerGradients& gradients) { benchmark::DoNotOptimize(gradients.layer); });
}

void own_text(benchmark::State& state, const Model& model) {
  constexpr int kSequences = 32, kLength = 1024;
  for (auto _ : state) benchmark::DoNotOptimize(generate_own_text(model, kSequences, kLength, 1));
  state.SetItemsProcessed(state.iterations() * kSequences * kLength);
}

constexpr int kProbeSamples = 32, kProbeLength = 512;

void probe(benchmark::State& state, const Model& model) {
  const auto samples = random_tokens(model, kProbeSamples, kProbeLength);
  for (auto _ : state) benchmark::DoNotOptimize(probe_sensitivities(model, samples, {}));
}

// The same by one pass forward and one backward, for a cache that keeps a window.
void adjoint_probe(benchmark::State& state, const Model& model) {
  const auto samples = random_tokens(model, kProbeSamples, kProbeLength);
  for (auto _ : state)
    likelihood_gradients(model, samples, {.window = 32, .weights = {}, .seed = 1},
                         [](const LayerGradients& gradients) { benchmark::DoNotOptimize(gradients.layer); });
}

// Forward passes over the probe's tokens, with logits, as many sequences at a time as the probe takes.
void probe_forward(benchmark::State& state, const Model& model) {
  const auto samples = random_tokens(model, kProbeSamples, kProbeLength);
  const int step = samples_per_step(samples);
  for (auto _ : state)
    for (int begin = 0; begin < samples.count; begin += step)
      mx::eval(model.logits(model.forward(token_array(samples, begin, begin + step), model.make_caches(FullCache::factory()))));
}

int run(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (argc != 2) {
    std::fprintf(stderr, "usage: engine_bench MODEL [--benchmark_filter=…]\n");
    return 2;
  }
  const Model model = Model::load(argv[1]);
  benchmark::RegisterBenchmark("sgemm", [](benchmark::State& state) { bench_sgemm(state, kTokens, 256, 1024); })->UseRealTime();
  const auto add = [&](const char* name, void (*work)(benchmark::State&, const Model&)) {
    benchmark::RegisterBenchmark(name, [work, &model](benchmark::State& state) { work(state, model); })
        ->UseRealTime()
        ->Unit(benchmark::kMillisecond);
  };
  add("forward", forward);
  add("forward_and_backward", forward_and_backward);
  add("own_text", own_text);
  add("probe_forward", probe_forward);
  add("adjoint_probe", adjoint_probe);
  add("probe", probe);
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}

}  // namespace
}  // namespace veloxquant

int main(int argc, char** argv) {
  return veloxquant::run(argc, argv);
}
