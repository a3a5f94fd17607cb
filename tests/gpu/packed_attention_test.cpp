// Attention over codes by our CUDA kernels, by what the CPU's cache gives.
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <string_view>

#include "mlx/backend/cuda/cuda.h"
#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "tests/cache/packed_inputs.h"
#include "veloxquant/cache/packed_arrays.h"
#include "veloxquant/cache/packed_cache.h"
#include "veloxquant/model/attention.h"

namespace veloxquant {
namespace {

using namespace testing;

class CudaKernels : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!mx::cu::is_available()) GTEST_SKIP() << "no CUDA";
  }
};

struct Case {
  int batch, query_heads, dim, codes, patches, window, sinks;
  float soft_cap;
  Rotation rotation = Rotation::kPlane;
  int sliding_window = 0;
};

// One unit for each head, the second of other codes; all alike where `alike`.
Stored units_of(const Sequence& x, const Case& c, bool alike) {
  Stored stored;
  for (int head = 0; head < (alike ? 1 : kHeads); ++head)
    for (const Side side : {Side::kKeys, Side::kValues}) {
      const auto& vectors = side == Side::kKeys ? x.k : x.v;
      const RotatedPqFitter fitter({vectors.data<float>(), vectors.size()}, c.dim, {},
                                   side == Side::kKeys ? c.rotation : Rotation::kFull);
      (side == Side::kKeys ? stored.keys : stored.values)
          .push_back(fitter.fit(side, {.codes = c.codes + 3 * head, .stages = 2, .patches = c.patches, .max_iter = 2}));
    }
  return stored;
}

double squared_distance(const mx::array& x, const mx::array& y) {
  return static_cast<double>(mx::sum(mx::square(mx::subtract(x, y))).item<float>());
}

// Chunks of tokens, and then some one by one, by the CPU's cache, the GPU's, and a full one.
void compare(const Stored& stored, const Case& c, const std::vector<int>& chunks, int steps) {
  const DeviceScope cpu(mx::Device::cpu);
  const int first_tokens = std::accumulate(chunks.begin(), chunks.end(), 0);
  SCOPED_TRACE(::testing::Message() << stored.keys[0].method << ", batch " << c.batch << ", " << c.query_heads << " query heads of "
                                    << c.dim << ", " << c.codes << " codes, " << c.patches << " patches, window " << c.window
                                    << ", sinks " << c.sinks << ", sliding window " << c.sliding_window << ", " << stored.keys.size()
                                    << " units, " << first_tokens << " tokens");
  const Sequence x(c.batch, first_tokens + steps, c.dim);
  const Rope rope(RopeConfig{}, c.dim);
  const AttentionSpec spec{.scale = 0.1f, .rope = &rope, .soft_cap = c.soft_cap, .sliding_window = c.sliding_window};
  PackedCache packed(std::make_shared<PackedLayer>(stored.keys, stored.values, c.window, c.sinks));
  const auto layer = std::make_shared<PackedArraysLayer>(stored.keys, stored.values, c.window, c.sinks);
  PackedArrays arrays(layer);
  FullCache full;
  int at = 0;
  double error = 0, cost = 0;  // of the kernels, and of storing
  const auto feed = [&](int tokens, std::uint64_t seed) {
    const auto q = random_array({c.batch, c.query_heads, tokens, c.dim}, seed), k = cut(x.k, at, at + tokens),
               v = cut(x.v, at, at + tokens);
    const auto by = [&](AttentionCache& cache) {
      auto out = cache.attend(q, k, v, spec);
      mx::eval(out);
      return out;
    };
    const auto expected = by(packed), exact = by(full);
    const auto got = [&] {
      const DeviceScope gpu(mx::Device::gpu);
      return by(arrays);
    }();
    at += tokens;
    const double wrong = squared_distance(expected, got), lost = squared_distance(expected, exact);
    error += wrong, cost += lost;
    EXPECT_LE(std::sqrt(wrong), 0.05 * std::sqrt(lost) + 1e-5 * std::sqrt(static_cast<double>(got.size())))
        << "after " << at << " tokens, the last " << tokens;
  };
  for (const int chunk : chunks) feed(chunk, 5 + static_cast<std::uint64_t>(at));
  for (int step = 0; step < steps; ++step) feed(1, 100 + static_cast<std::uint64_t>(step));
  {
    const DeviceScope gpu(mx::Device::gpu);
    EXPECT_NE(layer->kernels(rope, kHeads), nullptr);
  }
  // What was encoded is what the CPU encodes, but for vectors within rounding of a boundary.
  const DeviceScope gpu(mx::Device::gpu);
  const auto others = arrays.state(), own = packed.state();
  const DeviceScope back(mx::Device::cpu);
  for (const char* name : {"blocks", "sinks", "window", "patch_errors"}) {
    // Of very many codes pairs often tie, and either of them is right.
    if (std::string_view(name) == "blocks" && 2 * c.codes > c.dim) continue;
    const auto &mine = own.at(name), &its = others.at(name);
    ASSERT_EQ(mine.shape(), its.shape()) << name;
    if (mine.size() == 0) continue;
    const auto differ = std::string_view(name) == "patch_errors"
                            ? mx::greater(mx::abs(mx::subtract(mine, its)), mx::array(1e-3f))
                            : mx::not_equal(mine, its);
    EXPECT_LT(mx::mean(mx::astype(differ, mx::float32)).item<float>(), 0.01f) << name;
  }
  std::fprintf(stderr, "%s, %d of %d: %.3g of %.3g\n", stored.keys[0].method.c_str(), c.dim, first_tokens, std::sqrt(error),
               std::sqrt(cost));
}

void compare(const Case& c, bool alike, const std::vector<int>& chunks, int steps) {
  compare(units_of(Sequence(1, 600, c.dim, 10), c, alike), c, chunks, steps);
}

TEST_F(CudaKernels, AttendAsThePackedCacheDoes) {
  compare({1, 8, 64, 16, 0, 32, 4, 0}, false, {700}, 3);
  compare({1, 6, 64, 16, 3, 32, 4, 0}, false, {2, 5, 30, 263, 300}, 3);
  compare({2, 4, 128, 32, 3, 32, 4, 0}, true, {512, 488, 500}, 70);
  compare({1, 2, 64, 9, 5, 32, 0, 0}, false, {333}, 20);
  compare({1, 12, 64, 12, 2, 0, 4, 0}, false, {300, 300}, 20);
  compare({1, 4, 64, 12, 2, 0, 0, 0}, false, {300, 300}, 3);
  compare({2, 6, 128, 21, 4, 40, 4, 20}, false, {900}, 5);
  compare({1, 4, 128, 45, 3, 32, 4, 0}, true, {600}, 5);
}

// From where on tensor cores pay.
TEST_F(CudaKernels, AttendToManyTokens) {
  compare({1, 6, 64, 16, 3, 32, 4, 0}, false, {1500, 1500}, 3);
  compare({1, 4, 128, 32, 3, 32, 4, 0, Rotation::kFull}, false, {1500, 1500}, 3);
}

TEST_F(CudaKernels, AttendToKeysThatAreNoPlanes) {
  compare({1, 8, 64, 16, 3, 32, 4, 0, Rotation::kFull}, false, {700}, 20);
  compare({2, 4, 128, 32, 3, 32, 4, 0, Rotation::kFull}, true, {1000, 500}, 5);
  compare({1, 6, 80, 11, 0, 16, 4, 20, Rotation::kFull}, false, {600}, 5);
}

TEST_F(CudaKernels, ServeEveryShape) {
  for (const int dim : {64, 80, 96, 128, 256})
    for (const Rotation rotation : {Rotation::kPlane, Rotation::kFull})
      for (const int codes : {dim / 32, dim / 8, dim / 2 - 4}) compare({1, 6, dim, codes, 2, 32, 4, 0, rotation}, false, {400}, 2);
  compare({1, 2, 64, 60, 0, 32, 4, 0, Rotation::kFull}, false, {300}, 2);
  compare({1, 32, 64, 16, 3, 32, 4, 0}, false, {400}, 2);
  compare({1, 14, 64, 16, 3, 700, 4, 0}, false, {900}, 2);
  compare({1, 6, 64, 16, 3, 32, 4, 0, Rotation::kPlane, 200}, false, {400, 100}, 3);
  for (const int dim : {64, 128}) {
    const auto stored = of_method(Sequence(1, 600, dim, 10), dim, "vecinfer", 2);
    compare(stored, {1, 6, dim, dim / 4, 0, 32, 4, 0}, {400, 100}, 3);
    compare(stored, {1, 6, dim, dim / 4, 0, 0, 0, 0}, {400, 100}, 3);
  }
}

}  // namespace
}  // namespace veloxquant
