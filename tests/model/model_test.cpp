#include "veloxquant/model/model.h"

#include <dlfcn.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "mlx/ops.h"
#include "mlx/random.h"
#include "mlx/transforms.h"
#include "tests/model/demo_model.h"
#include "veloxquant/calibrate/observe.h"
#include "veloxquant/kernels/gemm.h"
#include "veloxquant/model/attention.h"
#include "veloxquant/model/cpu_operation.h"
#include "veloxquant/model/divergence.h"

namespace veloxquant {
namespace {

using testing::demo_model;

float largest_difference(const mx::array& a, const mx::array& b) {
  return mx::max(mx::abs(mx::subtract(a, b))).item<float>();
}
float range(const mx::array& x) {
  return mx::subtract(mx::max(x), mx::min(x)).item<float>();
}

mx::array logits_of(const mx::array& tokens) {
  const auto logits = demo_model().logits(demo_model().forward(tokens, demo_model().make_caches(FullCache::factory())));
  mx::eval(logits);
  return logits;
}

TEST(Model, OpenBlasDoesTheWork) {
  EXPECT_TRUE(blas_description().starts_with("OpenBLAS")) << blas_description();
}

// Whatever libraries bring, the first cblas_sgemm in the search order, which MLX's library binds to, is the program's own.
TEST(Model, MatrixProductsOfMlxComeToUs) {
  void* symbol = ::dlsym(RTLD_DEFAULT, "cblas_sgemm");
  ASSERT_NE(symbol, nullptr);
  Dl_info where{}, here{};
  ASSERT_NE(::dladdr(symbol, &where), 0);
  ASSERT_NE(::dladdr(reinterpret_cast<void*>(&blas_description), &here), 0);
  EXPECT_STREQ(where.dli_fname, here.dli_fname);
}

// The operations that a GPU runs, here on the CPU, are an independent implementation of our kernels.
TEST(Model, OwnKernelsEqualMlxOperations) {
  const auto tokens = token_array(testing::text_samples(2, 128), 0, 2);
  const auto ours = logits_of(tokens);
  const MlxOperationsScope scope;
  const auto theirs = logits_of(tokens);
  EXPECT_LE(largest_difference(ours, theirs), 1e-4f * range(theirs));
}

TEST(Model, SequencesOfABatchDoNotMeet) {
  const auto samples = testing::text_samples(3, 64);
  const auto together = logits_of(token_array(samples, 0, 3));
  for (int i = 0; i < 3; ++i) {
    const auto alone = logits_of(token_array(samples, i, i + 1));
    EXPECT_LE(largest_difference(mx::slice(together, {i, 0, 0}, {i + 1, 64, together.shape(2)}), alone), 1e-4f * range(alone));
  }
}

TEST(Model, TokenByTokenEqualsInOneGo) {
  const auto tokens = token_array(testing::text_samples(1, 40), 0, 1);
  const auto whole = logits_of(tokens);
  const auto caches = demo_model().make_caches(FullCache::factory());
  for (int t = 0; t < 40; ++t) {
    const auto logits = demo_model().logits(demo_model().forward(mx::slice(tokens, {0, t}, {1, t + 1}), caches));
    EXPECT_LE(largest_difference(logits, mx::slice(whole, {0, t, 0}, {1, t + 1, whole.shape(2)})), 1e-4f * range(whole))
        << "token " << t;
  }
  EXPECT_EQ(caches[0]->offset(), 40);
  EXPECT_GE(caches[0]->nbytes(), 2u * 2 * 40 * 64 * sizeof(float));
}

TEST(Divergence, KernelEqualsMlxOperations) {
  const auto samples = testing::text_samples(1, 96);
  const auto clean = demo_model().forward(token_array(samples, 0, 1), demo_model().make_caches(FullCache::factory()));
  const auto noisy =
      mx::add(clean, mx::multiply(mx::array(0.1f), mx::random::normal(clean.shape(), mx::float32, mx::random::key(1))));
  mx::eval(clean, noisy);
  std::vector<std::int32_t> targets(samples.row(0).begin() + 1, samples.row(0).end());
  targets.push_back(-1);
  const auto ours = score_hidden(demo_model(), {clean, noisy}, targets);
  const MlxOperationsScope scope;
  const auto theirs = score_hidden(demo_model(), {clean, noisy}, targets);
  for (std::size_t s = 0; s < 2; ++s) {
    for (std::size_t t = 0; t < ours[s].size(); ++t) {
      EXPECT_NEAR(ours[s][t].kl, theirs[s][t].kl, 1e-4 * (1 + theirs[s][t].kl));
      EXPECT_NEAR(ours[s][t].cross_entropy, theirs[s][t].cross_entropy, 1e-3);
      EXPECT_EQ(ours[s][t].top, theirs[s][t].top);
    }
  }
  EXPECT_EQ(ours[0][0].kl, 0.0f);
  EXPECT_EQ(ours[1].back().cross_entropy, 0.0f);
}

TEST(Device, WordsOfDevices) {
  EXPECT_EQ(resolve_device("cpu"), mx::Device(mx::Device::cpu));
  EXPECT_THROW(resolve_device("tpu"), std::invalid_argument);
  EXPECT_THROW(resolve_device_or_cpu("GPU"), std::invalid_argument);
  if (!mx::is_available(mx::Device(mx::Device::gpu))) {
    EXPECT_THROW(resolve_device("gpu"), std::runtime_error);
    EXPECT_EQ(resolve_device_or_cpu("gpu"), mx::Device(mx::Device::cpu));
  }
}

}  // namespace
}  // namespace veloxquant
