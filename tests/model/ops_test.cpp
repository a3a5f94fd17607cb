// Values and gradients of the decoder's operations against MLX's own and their autograd.
#include "veloxquant/model/ops.h"

#include <gtest/gtest.h>

#include <functional>

#include "mlx/ops.h"
#include "mlx/random.h"
#include "mlx/transforms.h"
#include "veloxquant/model/cpu_operation.h"
#include "veloxquant/model/experts.h"
#include "veloxquant/model/rope.h"

namespace veloxquant {
namespace {

mx::array normal(const mx::Shape& shape, std::uint64_t seed) {
  return mx::random::normal(shape, mx::float32, mx::random::key(seed));
}

Matrix matrix(int rows, int columns, std::uint64_t seed) {
  const auto values = std::make_shared<mx::array>(normal({rows, columns}, seed));
  mx::eval(*values);
  return {values, values->data<float>(), rows, columns};
}

float largest_difference(const mx::array& a, const mx::array& b) {
  return mx::max(mx::abs(mx::subtract(a, b))).item<float>();
}

void expect_equals_mlx(const std::vector<mx::array>& inputs,
                       const std::function<mx::array(const std::vector<mx::array>&)>& operation) {
  const auto as_list = [&](const std::vector<mx::array>& x) { return std::vector<mx::array>{operation(x)}; };
  const auto shape = operation(inputs).shape();
  const auto weights = normal(shape, 99);
  const auto [ours, our_gradients] = mx::vjp(as_list, inputs, {weights});
  mx::eval(ours);
  mx::eval(our_gradients);
  const MlxOperationsScope scope;
  const auto [theirs, their_gradients] = mx::vjp(as_list, inputs, {weights});
  EXPECT_LE(largest_difference(ours[0], theirs[0]), 1e-4f);
  for (std::size_t i = 0; i < inputs.size(); ++i)
    EXPECT_LE(largest_difference(our_gradients[i], their_gradients[i]), 1e-4f) << "input " << i;
}

TEST(Ops, RmsNorm) {
  const auto weight = normal({33}, 1);
  expect_equals_mlx({normal({2, 5, 33}, 2)}, [&](const auto& x) { return rms_norm(x[0], weight, 1e-5f); });
}

TEST(Ops, LinearMapsWithBiasAndResidual) {
  Linear linear;
  linear.add(matrix(24, 17, 1), std::nullopt);
  linear.add(matrix(7, 17, 2), normal({7}, 3));
  expect_equals_mlx({normal({2, 5, 17}, 4)}, [&](const auto& x) { return linear(x[0]); });
  expect_equals_mlx({normal({2, 5, 17}, 4), normal({2, 5, 31}, 5)}, [&](const auto& x) { return linear(x[0], x[1]); });
  expect_equals_mlx({normal({2, 5, 17}, 4)}, [&](const auto& x) {
    const auto parts = linear.parts(x[0]);
    return mx::add(mx::sum(parts[0], -1), mx::sum(mx::multiply(parts[1], parts[1]), -1));
  });
}

TEST(Ops, LinearBackwardIsTheGradient) {
  Linear linear;
  linear.add(matrix(24, 17, 1), std::nullopt);
  const auto gradient = normal({3, 24}, 2);
  const auto ours = linear.backward(gradient);
  mx::eval(ours);
  const MlxOperationsScope scope;
  EXPECT_LE(largest_difference(ours, linear.backward(gradient)), 1e-5f);
}

TEST(Ops, Gate) {
  Linear gate_up;
  gate_up.add(matrix(12, 17, 1), std::nullopt);
  gate_up.add(matrix(12, 17, 2), std::nullopt);
  for (const auto activation : {Activation::kSilu, Activation::kGelu})
    expect_equals_mlx({normal({2, 5, 17}, 3)}, [&](const auto& x) { return gate(activation, gate_up, x[0]); });
}

// Parts of one tensor are maps of their own.
TEST(Ops, LinearOfParts) {
  const Matrix whole = matrix(24, 17, 1);
  Linear one, parts;
  one.add(whole, std::nullopt);
  for (const auto& [begin, end] : {std::pair(0, 5), std::pair(5, 6), std::pair(6, 24)})
    parts.add(whole.part(begin, end), std::nullopt);
  const auto x = normal({3, 17}, 2);
  EXPECT_LE(largest_difference(one(x), parts(x)), 1e-6f);
  EXPECT_EQ(parts.parts(x)[1].shape(), (mx::Shape{3, 1}));
  const MlxOperationsScope scope;
  EXPECT_LE(largest_difference(one(x), parts(x)), 1e-5f);
}

TEST(Ops, Experts) {
  std::vector<Expert> experts;
  for (std::uint64_t i = 0; i < 5; ++i)
    experts.push_back({matrix(12, 16, 3 * i), matrix(12, 16, 3 * i + 1), matrix(16, 12, 3 * i + 2)});
  Linear router;
  router.add(matrix(5, 16, 99), std::nullopt);
  for (const bool normalized : {false, true}) {
    for (const int per_token : {1, 2, 5}) {
      const ExpertsConfig config{.count = 5, .per_token = per_token, .intermediate_size = 12, .normalized = normalized};
      const Experts mixture(router, experts, config, Activation::kSilu);
      expect_equals_mlx({normal({2, 9, 16}, 3)}, [&](const auto& x) { return mixture(x[0]); });
    }
  }
}

// What mx::quantize packs is read as it restores it, on our kernels and on MLX's.
TEST(Ops, PackedMatrices) {
  const auto values = normal({24, 64}, 1);
  for (const int bits : {2, 3, 4, 5, 6, 8}) {
    const auto packed = mx::quantize(values, 32, bits);
    const Matrix matrix(PackedMatrix{packed[0], packed[1], packed[2], {"affine", 32, bits}});
    EXPECT_EQ(matrix.rows(), 24);
    EXPECT_EQ(matrix.columns(), 64);
    const auto restored = mx::dequantize(packed[0], packed[1], packed[2], 32, bits);
    EXPECT_EQ(largest_difference(mx::array(matrix.data(), {24, 64}), restored), 0.0f);
    EXPECT_EQ(largest_difference(mx::array(matrix.part(3, 9).data(), {6, 64}), mx::slice(restored, {3, 0}, {9, 64})), 0.0f);
    Linear linear;
    linear.add(matrix, std::nullopt);
    expect_equals_mlx({normal({3, 64}, 2)}, [&](const auto& x) { return linear(x[0]); });
  }
}

TEST(Ops, Rope) {
  RopeConfig config;
  config.theta = 100;
  for (const int dims : {16, 6, 0}) {
    config.dims = dims;
    config.magnitude = dims == 6 ? 1.25 : 1;
    const Rope rope(config, 16);
    for (const int offset : {0, 77})
      expect_equals_mlx({normal({2, 3, 50, 16}, 1)}, [&](const auto& x) { return rope(x[0], offset); });
  }
}

TEST(Ops, Embed) {
  const Matrix table = matrix(50, 8, 1);
  const std::vector<std::int32_t> tokens = {0, 49, 7, 7, 3, 12};
  const mx::array ids(tokens.data(), {2, 3}, mx::int32);
  const auto ours = embed(table, ids);
  mx::eval(ours);
  const MlxOperationsScope scope;
  EXPECT_EQ(largest_difference(ours, embed(table, ids)), 0.0f);
}

}  // namespace
}  // namespace veloxquant
