// What must hold on a GPU, by the CPU's own results.  Skipped where MLX has no GPU back end: make test-gpu wants one.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <set>

#include "mlx/ops.h"
#include "mlx/primitives.h"
#include "mlx/random.h"
#include "mlx/transforms.h"
#include "tests/model/demo_model.h"
#include "veloxquant/cache/packed_cache.h"
#include "veloxquant/cache/restoring_cache.h"
#include "veloxquant/calibrate/adjoint_plan.h"
#include "veloxquant/calibrate/gradients.h"
#include "veloxquant/calibrate/make_plan.h"
#include "veloxquant/calibrate/observe.h"
#include "veloxquant/calibrate/sensitivity.h"
#include "veloxquant/calibrate/unit_statistics.h"
#include "veloxquant/evaluate/evaluate.h"
#include "veloxquant/evaluate/peers.h"
#include "veloxquant/generate/own_text.h"
#include "veloxquant/model/attention.h"
#include "veloxquant/model/experts.h"
#include "veloxquant/model/sampling.h"

namespace veloxquant {
namespace {

using testing::demo_folder;
using testing::text_samples;

// Of what a figure may differ by between devices.
constexpr double kTolerance = 0.02;

class Gpu : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!mx::is_available(mx::Device::gpu)) {
      if (std::getenv("VELOXQUANT_GPU")) FAIL() << "this build of MLX has no GPU back end";
      GTEST_SKIP() << "no GPU";
    }
  }

  // The same on each device.
  template <class Work>
  static auto on(mx::Device device, Work work) {
    const DeviceScope scope(device);
    return work();
  }
};

// Loaded on the GPU: matrices stay as they are stored.
const Model& gpu_model() {
  static const Model model = [] {
    const DeviceScope scope(mx::Device::gpu);
    return Model::load(demo_folder());
  }();
  return model;
}

// Every operation that is still to run for `x`, once.
void expect_on_gpu(const std::vector<mx::array>& wanted, const char* what) {
  std::set<std::uintptr_t> seen;
  std::vector<mx::array> waiting = wanted;
  std::size_t operations = 0;
  while (!waiting.empty()) {
    const mx::array x = waiting.back();
    waiting.pop_back();
    if (!x.has_primitive() || !seen.insert(x.id()).second) continue;
    ++operations;
    EXPECT_EQ(x.primitive().stream().device, mx::Device::gpu) << what << ": " << x.primitive().name();
    waiting.insert(waiting.end(), x.inputs().begin(), x.inputs().end());
  }
  EXPECT_GT(operations, 0u) << what;
}

Plan plan_of(const std::string& method, double bits) {
  const DeviceScope scope(mx::Device::cpu);
  PlanOptions options{.method = method, .bits = bits};
  return make_plan(testing::demo_model(), text_samples(2, 128), options);
}

const Plan& best_plan() {
  static const Plan plan = [] {
    const DeviceScope scope(mx::Device::cpu);
    const CalibrationSet set{text_samples(1, 256), 1, {}, {}};
    return make_adjoint_plan(testing::demo_model(), set, {.bits = 1.5, .context = 2048}).plan;
  }();
  return plan;
}

const std::vector<std::pair<std::string, Plan>>& plans() {
  static const std::vector<std::pair<std::string, Plan>> all = {{"affine", plan_of("affine", 4.5)},
                                                                {"kivi", plan_of("kivi", 3)},
                                                                {"turboquant", plan_of("turboquant", 2.25)},
                                                                {"vecinfer", plan_of("vecinfer", 2)},
                                                                {"rotated_pq", best_plan()}};
  return all;
}

TEST_F(Gpu, NoPrimitiveOnTheCpu) {
  std::vector<std::pair<std::string, CacheFactory>> factories = {{"full", FullCache::factory()}};
  for (const auto& [method, plan] : plans()) {
    factories.emplace_back(method, restoring_factory(plan));
    if (method == "kivi") continue;
    factories.emplace_back("packed " + method, on(mx::Device::gpu, [&] { return packed_factory(plan); }));
  }
  for (const auto& name : {"mlx4+window", "kivi2", "turboquant2"})
    factories.emplace_back(name, peer_storage(name, testing::demo_model()).factory);
  const DeviceScope scope(mx::Device::gpu);
  const auto& model = gpu_model();
  const auto tokens = token_array(text_samples(1, 128), 0, 1);
  for (const auto& [name, factory] : factories) {
    SCOPED_TRACE(name);
    const auto caches = model.make_caches(factory);
    const auto hidden = model.forward(tokens, caches);
    expect_on_gpu({hidden, model.logits(hidden)}, "forward");
    mx::eval(hidden);
    expect_on_gpu({model.forward(token_array(text_samples(1, 128), 0, 1), caches)}, "further tokens");
  }
  const auto layer = [&](const std::vector<mx::array>& x) {
    FullCache cache;
    return std::vector<mx::array>{model.layer(3, x[0], cache)};
  };
  const auto hidden = model.embed(tokens);
  expect_on_gpu(mx::vjp(layer, {hidden}, {mx::ones_like(hidden)}).second, "backward");
  const auto logits = mx::reshape(model.logits(hidden), {128, -1});
  expect_on_gpu({sampled_score(logits, mx::full({128}, 0.5f))}, "sampled score");
  expect_on_gpu({model.hidden_gradient(mx::reshape(hidden, {128, -1}), logits)}, "gradient of the head");
}

TEST_F(Gpu, LogitsAreThoseOfTheCpu) {
  const auto tokens = token_array(text_samples(1, 200), 0, 1);
  const auto logits = [&](const Model& model) {
    const auto x = model.logits(model.forward(tokens, model.make_caches(FullCache::factory())));
    mx::eval(x);
    return x;
  };
  const auto gpu = on(mx::Device::gpu, [&] { return logits(gpu_model()); }),
             cpu = on(mx::Device::cpu, [&] { return logits(testing::demo_model()); });
  const DeviceScope scope(mx::Device::cpu);
  const float range = mx::subtract(mx::max(cpu), mx::min(cpu)).item<float>();
  EXPECT_LE(mx::max(mx::abs(mx::subtract(gpu, cpu))).item<float>(), 1e-3f * range);
}

TEST_F(Gpu, StorageCostsWhatItDoesOnTheCpu) {
  // Rounding differs, and where a code falls otherwise all that follows does: it takes some text for means to agree.
  const auto windows = on(mx::Device::cpu, [] { return generate_own_text(testing::demo_model(), 12, 1024, 9); });
  const std::vector<Storage> storages = {plan_storage("rotated_pq", best_plan()), plan_storage("vecinfer", plan_of("vecinfer", 2)),
                                         peer_storage("mlx4", testing::demo_model()),
                                         peer_storage("kivi2+window", testing::demo_model())};
  const auto gpu = on(mx::Device::gpu, [&] { return evaluate(gpu_model(), windows, storages, {}); });
  const auto cpu = on(mx::Device::cpu, [&] { return evaluate(testing::demo_model(), windows, storages, {}); });
  for (std::size_t i = 0; i < cpu.size(); ++i) {
    EXPECT_NEAR(gpu[i].perplexity, cpu[i].perplexity, kTolerance * cpu[i].perplexity) << cpu[i].storage;
    EXPECT_NEAR(gpu[i].kl_mean, cpu[i].kl_mean, kTolerance * cpu[i].kl_mean) << cpu[i].storage;
  }
}

// Codes may differ where a vector is within rounding of a boundary, so that only means agree.
TEST_F(Gpu, PackedCachesAreThoseOfTheCpu) {
  const auto tokens = token_array(text_samples(1, 280), 0, 1);
  for (const auto& [method, plan] : plans()) {
    if (method == "kivi") continue;
    const auto logits = [&](const Model& model) {
      const auto caches = model.make_caches(packed_factory(plan));
      std::vector<mx::array> parts;
      for (int begin = 0; begin < 280;) {
        const int count = begin == 0 ? 180 : begin < 240 ? 1 : 40;
        parts.push_back(model.logits(model.forward(mx::slice(tokens, {0, begin}, {1, begin + count}), caches)));
        mx::eval(parts.back());
        begin += count;
      }
      auto all = mx::concatenate(parts, 1);
      mx::eval(all);
      return all;
    };
    const auto gpu = on(mx::Device::gpu, [&] { return logits(gpu_model()); }),
               cpu = on(mx::Device::cpu, [&] { return logits(testing::demo_model()); });
    const DeviceScope scope(mx::Device::cpu);
    const float range = mx::subtract(mx::max(cpu), mx::min(cpu)).item<float>();
    EXPECT_LE(mx::mean(mx::abs(mx::subtract(gpu, cpu))).item<float>(), 2e-3f * range) << method;
  }
}

TEST_F(Gpu, SensitivitiesAreThoseOfTheCpu) {
  const auto samples = text_samples(2, 128);
  const auto probe = [&](const Model& model) {
    return probe_sensitivities(model, samples, {.seed = 3, .quantizers = {}, .rates = {}});
  };
  const auto gpu = on(mx::Device::gpu, [&] { return probe(gpu_model()); }),
             cpu = on(mx::Device::cpu, [&] { return probe(testing::demo_model()); });
  double sum = 0, expected = 0;
  for (const auto& [layer, result] : cpu) sum += gpu.at(layer).mean_sensitivity, expected += result.mean_sensitivity;
  EXPECT_NEAR(sum, expected, kTolerance * expected);
}

TEST_F(Gpu, GradientsAreThoseOfTheCpu) {
  const auto samples = text_samples(1, 256);
  const auto traces = [&](const Model& model) {
    const auto store = unit_statistics(model, samples, {.gradients = {.window = 32, .weights = {}, .seed = 1}, .sinks = 4});
    double sum = 0;
    for (std::size_t i = 0; i < store.size(); ++i) {
      const auto unit = store.get(i);
      for (std::size_t d = 0; d < 64; ++d) sum += unit.metric[d * 65];
    }
    return sum;
  };
  const double gpu = on(mx::Device::gpu, [&] { return traces(gpu_model()); }),
               cpu = on(mx::Device::cpu, [&] { return traces(testing::demo_model()); });
  EXPECT_NEAR(gpu, cpu, kTolerance * cpu);
}

TEST_F(Gpu, Experts) {
  const DeviceScope scope(mx::Device::gpu);
  const auto normal = [](mx::Shape shape, std::uint64_t seed) {
    return mx::random::normal(shape, mx::float32, mx::random::key(seed));
  };
  const auto matrix = [&](int rows, int columns, std::uint64_t seed, bool packed) {
    const auto values = normal({rows, columns}, seed);
    if (!packed) return Matrix(mx::astype(values, mx::bfloat16));
    const auto x = mx::quantize(values, 32, 4);
    return Matrix(PackedMatrix{x[0], x[1], x[2], {"affine", 32, 4}});
  };
  const auto x = normal({2, 50, 64}, 7), by_output = normal({2, 50, 64}, 8);
  mx::eval(x, by_output);
  for (const bool packed : {false, true}) {
    const auto stack = [&](int rows, int columns, std::uint64_t seed) {
      std::vector<Matrix> single;
      for (std::uint64_t i = 0; i < 4; ++i) single.push_back(matrix(rows, columns, seed + 3 * i, packed));
      return MatrixStack(std::move(single));
    };
    Linear router;
    router.add(matrix(4, 64, 99, packed), std::nullopt);
    const Experts mixture(router, {stack(96, 64, 0), stack(96, 64, 1), stack(64, 96, 2)},
                          {.count = 4, .per_token = 2, .intermediate_size = 96}, Activation::kGelu);
    const auto with_gradient = [&] {
      const auto forward = [&](const std::vector<mx::array>& in) { return std::vector<mx::array>{mixture(in[0])}; };
      const auto [outputs, gradients] = mx::vjp(forward, {x}, {by_output});
      return std::vector<mx::array>{outputs[0], gradients[0]};
    };
    const auto gpu = with_gradient();
    expect_on_gpu(gpu, "experts");
    mx::eval(gpu);
    const auto cpu = on(mx::Device::cpu, [&] {
      const auto y = with_gradient();
      mx::eval(y);
      return y;
    });
    for (std::size_t i = 0; i < gpu.size(); ++i)
      EXPECT_LE(mx::max(mx::abs(mx::subtract(gpu[i], cpu[i]))).item<float>(), kTolerance * mx::max(mx::abs(cpu[i])).item<float>());
  }
}

TEST_F(Gpu, WritesItsOwnText) {
  const auto samples = on(mx::Device::gpu, [] { return generate_own_text(gpu_model(), 3, 64, 5); });
  EXPECT_EQ(samples.count, 3);
  EXPECT_GT(std::set<std::int32_t>(samples.tokens.begin(), samples.tokens.end()).size(), 40u);
}

TEST_F(Gpu, AttentionOfLongTextsTakesStretchesOfQueries) {
  const DeviceScope scope(mx::Device::gpu);
  const auto some = [](int heads, int seed) {
    return mx::random::normal({1, heads, 8192, 64}, mx::float32, mx::random::key(seed));
  };
  const auto q = some(4, 1), k = some(2, 2), v = some(2, 3);
  mx::eval(q, k, v);
  for (const auto& near : {std::optional<NearTokens>(), std::optional(NearTokens{32, k, v})}) {
    const auto all = causal_attention_graph(q, k, v, {.scale = 0.125f}, near, std::int64_t{1} << 40);
    mx::eval(all);
    const auto stretches = causal_attention_graph(q, k, v, {.scale = 0.125f}, near, 1 << 22);
    mx::eval(stretches);
    EXPECT_LE(mx::max(mx::abs(mx::subtract(all, stretches))).item<float>(), 1e-4f);
  }
}

}  // namespace
}  // namespace veloxquant
