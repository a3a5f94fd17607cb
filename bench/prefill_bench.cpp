// Reading and writing with packed caches, beside the same model with full precision.  usage: prefill_bench MODEL [Google
// Benchmark's options]
#include <cstdio>

#include "bench/common.h"
#include "mlx/ops.h"
#include "mlx/random.h"
#include "mlx/transforms.h"
#include "veloxquant/cache/packed_cache.h"
#include "veloxquant/core/random.h"
#include "veloxquant/model/attention.h"
#include "veloxquant/model/model.h"
#include "veloxquant/quantize/rotated_pq.h"

namespace veloxquant {
namespace {

constexpr int kTokens = 2048, kChunk = 512;

mx::array random_tokens(const Model& model) {
  std::vector<std::int32_t> tokens(kTokens);
  Random random(1);
  for (auto& token : tokens) token = static_cast<std::int32_t>(random.below(static_cast<std::uint64_t>(model.config().vocab_size)));
  return mx::array(tokens.data(), {1, kTokens}, mx::int32);
}

// 2 bits of codes, 1.2 % of the tokens patched, window and sinks as by default; what codes stand for makes no difference in time.
CacheFactory packed(const Model& model, Rotation rotation) {
  const auto& config = model.config();
  auto x = mx::random::normal({16384, config.head_dim}, mx::float32, mx::random::key(1));
  x.eval();
  const auto fit = [&](Side side, Rotation how) {
    const auto unit = RotatedPqFitter({x.data<float>(), x.size()}, config.head_dim, {}, how)
                          .fit(side, {.codes = config.head_dim / 4, .stages = 2, .patches = 3, .max_iter = 2});
    return std::vector(static_cast<std::size_t>(config.num_kv_heads), unit);
  };
  const auto keys = fit(Side::kKeys, rotation), values = fit(Side::kValues, Rotation::kFull);
  std::vector<std::shared_ptr<const PackedLayer>> layers;
  for (int i = 0; i < config.num_layers; ++i)
    layers.push_back(std::make_shared<const PackedLayer>(keys, values, kDefaultWindow, kDefaultSinks));
  return [layers](int layer) { return std::make_unique<PackedCache>(layers.at(static_cast<std::size_t>(layer))); };
}

void read(const Model& model, const mx::array& tokens, int begin, int end, const AttentionCaches& caches) {
  const auto hidden = model.forward(mx::slice(tokens, {0, begin}, {1, end}), caches);
  mx::eval(model.logits(mx::slice(hidden, {0, end - begin - 1, 0}, {1, end - begin, hidden.shape(2)})));
}

void prefill(benchmark::State& state, const Model& model, const CacheFactory& factory) {
  const auto tokens = random_tokens(model);
  for (auto _ : state) {
    const auto caches = model.make_caches(factory);
    for (int at = 0; at < kTokens; at += kChunk) read(model, tokens, at, at + kChunk, caches);
  }
}

// 256 tokens, one by one, after 512.
void write(benchmark::State& state, const Model& model, const CacheFactory& factory) {
  const auto tokens = random_tokens(model);
  for (auto _ : state) {
    state.PauseTiming();
    const auto caches = model.make_caches(factory);
    read(model, tokens, 0, kChunk, caches);
    state.ResumeTiming();
    for (int at = kChunk; at < kChunk + 256; ++at) read(model, tokens, at, at + 1, caches);
  }
}

int run(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (argc != 2) {
    std::fprintf(stderr, "usage: prefill_bench MODEL [--benchmark_filter=…]\n");
    return 2;
  }
  const Model model = Model::load(argv[1]);
  const auto add = [&](const std::string& name, const CacheFactory& factory) {
    for (const auto& [what, work] : {std::pair{"prefill/", &prefill}, {"write/", &write}})
      benchmark::RegisterBenchmark((what + name).c_str(),
                                   [work = work, &model, factory](benchmark::State& state) { work(state, model, factory); })
          ->MeasureProcessCPUTime()
          ->UseRealTime()
          ->Unit(benchmark::kMillisecond);
  };
  add("float32", FullCache::factory());
  add("plane", packed(model, Rotation::kPlane));
  add("full", packed(model, Rotation::kFull));
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}

}  // namespace
}  // namespace veloxquant

int main(int argc, char** argv) {
  veloxquant::mx::set_default_device(veloxquant::mx::Device::cpu);
  return veloxquant::run(argc, argv);
}
