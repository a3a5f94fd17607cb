// Attention over codes by our CUDA kernels, by what the CPU's cache gives.
#include <gtest/gtest.h>

#include <cmath>

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

mx::array random_queries(const Case& c, std::uint64_t seed) {
  return random_array({c.batch, c.query_heads, 1, c.dim}, seed);
}

void compare(const Case& c, bool alike, int first_tokens, int steps) {
  const DeviceScope cpu(mx::Device::cpu);
  SCOPED_TRACE(::testing::Message() << "batch " << c.batch << ", " << c.query_heads << " query heads of " << c.dim << ", "
                                    << c.codes << " codes, " << c.patches << " patches, window " << c.window << ", sinks "
                                    << c.sinks << (alike ? ", heads alike" : "") << ", " << first_tokens << " tokens");
  const auto stored = units_of(Sequence(1, 600, c.dim, 10), c, alike);
  const Sequence x(c.batch, first_tokens + steps, c.dim);
  const Rope rope(RopeConfig{}, c.dim);
  const AttentionSpec spec{.scale = 0.1f, .rope = &rope, .soft_cap = c.soft_cap};
  PackedCache packed(std::make_shared<PackedLayer>(stored.keys, stored.values, c.window, c.sinks));
  const auto layer = std::make_shared<PackedArraysLayer>(stored.keys, stored.values, c.window, c.sinks);
  PackedArrays arrays(layer);
  const auto feed = [&](AttentionCache& cache, int begin, int end, const mx::array& q) {
    auto out = cache.attend(q, cut(x.k, begin, end), cut(x.v, begin, end), spec);
    mx::eval(out);
    return out;
  };
  const auto on_gpu = [&](int begin, int end, const mx::array& q) {
    const DeviceScope gpu(mx::Device::gpu);
    return feed(arrays, begin, end, q);
  };
  FullCache full;
  const auto first = random_array({c.batch, c.query_heads, first_tokens, c.dim}, 5);
  feed(packed, 0, first_tokens, first);
  feed(full, 0, first_tokens, first);
  on_gpu(0, first_tokens, first);
  double error = 0, cost = 0;  // of the kernels, and of storing
  for (int step = 0; step < steps; ++step) {
    const auto q = random_queries(c, 100 + static_cast<std::uint64_t>(step));
    const int at = first_tokens + step;
    const auto expected = feed(packed, at, at + 1, q), got = on_gpu(at, at + 1, q), exact = feed(full, at, at + 1, q);
    const auto square = [](const mx::array& x, const mx::array& y) {
      return static_cast<double>(mx::sum(mx::square(mx::subtract(x, y))).item<float>());
    };
    error += square(expected, got), cost += square(expected, exact);
  }
  {
    const DeviceScope gpu(mx::Device::gpu);
    EXPECT_NE(layer->kernels(rope, kHeads), nullptr);
  }
  // What was encoded is what the CPU encodes, but for vectors within rounding of a boundary.
  const DeviceScope gpu(mx::Device::gpu);
  const auto blocks = packed.state().at("blocks"), others = arrays.state().at("blocks");
  ASSERT_EQ(blocks.shape(), others.shape());
  const DeviceScope back(mx::Device::cpu);
  const float differ = mx::mean(mx::astype(mx::not_equal(blocks, others), mx::float32)).item<float>();
  std::fprintf(stderr, "%g of %g, %g of the bytes\n", std::sqrt(error), std::sqrt(cost), static_cast<double>(differ));
  EXPECT_LT(differ, 0.01f);
  // Entries are bytes, keys and weights half precision; a vector within rounding of a boundary may get another code.
  EXPECT_LT(std::sqrt(error), 0.1 * std::sqrt(cost));
}

TEST_F(CudaKernels, AttendAsThePackedCacheDoes) {
  compare({1, 8, 64, 16, 0, 32, 4, 0}, false, 700, 3);
  compare({2, 4, 128, 32, 3, 32, 4, 0}, true, 1500, 70);
  compare({1, 2, 64, 9, 5, 32, 0, 0}, false, 333, 20);
  compare({1, 12, 64, 12, 2, 0, 4, 0}, false, 600, 20);
  compare({2, 6, 128, 21, 4, 40, 4, 20}, false, 900, 5);
  compare({1, 4, 128, 45, 3, 32, 4, 0}, true, 600, 5);
}

TEST_F(CudaKernels, AttendToKeysThatAreNoPlanes) {
  compare({1, 8, 64, 16, 3, 32, 4, 0, Rotation::kFull}, false, 700, 20);
  compare({2, 4, 128, 32, 3, 32, 4, 0, Rotation::kFull}, true, 1500, 5);
  compare({1, 6, 80, 11, 0, 16, 4, 20, Rotation::kFull}, false, 600, 5);
}

}  // namespace
}  // namespace veloxquant
