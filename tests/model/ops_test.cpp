// Values and gradients of the decoder's operations against MLX's own and their autograd.
#include "veloxquant/model/ops.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <optional>

#include "mlx/memory.h"
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

constexpr int kExperts = 5, kInner = 12, kHidden = 16;

MatrixStack stack_of(const mx::array& all, bool joined) {
  if (joined) return {Matrix(mx::reshape(all, {-1, all.shape(-1)})), kExperts};
  std::vector<Matrix> single;
  for (const auto& one : mx::split(all, kExperts, 0)) single.emplace_back(mx::squeeze(one, 0));
  return MatrixStack(std::move(single));
}

// All experts of all tokens, the weights of those that are not chosen being zero.
mx::array experts_by_formula(const mx::array& x, const mx::array& router, const mx::array& gate, const mx::array& up,
                             const mx::array& down, const ExpertsConfig& config) {
  const auto scores = mx::softmax(mx::matmul(x, mx::transpose(router)), -1);
  const auto least =
      mx::slice(mx::sort(scores, -1), {0, kExperts - config.per_token}, {x.shape(0), kExperts - config.per_token + 1});
  auto weights = mx::where(mx::greater_equal(scores, mx::stop_gradient(least)), scores, mx::array(0.0f));
  if (config.normalized) weights = mx::divide(weights, mx::sum(weights, -1, true));
  const auto each = [](const mx::array& rows, const mx::array& maps) { return mx::matmul(rows, mx::swapaxes(maps, -1, -2)); };
  const auto inner = mx::multiply(activate(Activation::kSilu, each(x, gate)), each(x, up));  // [experts, tokens, inner]
  return mx::sum(mx::multiply(each(inner, down), mx::expand_dims(mx::transpose(weights), -1)), 0);
}

// However they were given, wherever they run, few tokens and many.
TEST(Ops, Experts) {
  using Operation = std::function<mx::array(const mx::array&)>;
  const auto router = normal({kExperts, kHidden}, 99), gate = normal({kExperts, kInner, kHidden}, 1),
             up = normal({kExperts, kInner, kHidden}, 2), down = normal({kExperts, kHidden, kInner}, 3);
  Linear scores;
  scores.add(Matrix(router), std::nullopt);
  const auto with_gradient = [](const Operation& operation, const mx::array& x) {
    const auto as_list = [&](const std::vector<mx::array>& in) { return std::vector<mx::array>{operation(in[0])}; };
    const auto [outputs, gradients] = mx::vjp(as_list, {x}, {normal(x.shape(), 98)});
    mx::eval(outputs[0], gradients[0]);
    return std::pair(outputs[0], gradients[0]);
  };
  for (const int per_token : {1, 2, 5}) {
    for (const int tokens : {9, 150}) {
      const ExpertsConfig config{
          .count = kExperts, .per_token = per_token, .intermediate_size = kInner, .normalized = per_token == 2};
      const auto x = normal({tokens, kHidden}, 4);
      const auto expected =
          with_gradient([&](const auto& in) { return experts_by_formula(in, router, gate, up, down, config); }, x);
      const float tolerance = 1e-5f * mx::max(mx::abs(expected.second)).item<float>();
      for (const bool joined : {false, true}) {
        for (const bool loaded_by_mlx : {false, true}) {
          std::optional<MlxOperationsScope> scope;
          if (loaded_by_mlx) scope.emplace();
          const Experts mixture(scores, {stack_of(gate, joined), stack_of(up, joined), stack_of(down, joined)}, config,
                                Activation::kSilu);
          for (const bool run_by_mlx : {false, true}) {
            scope.reset();
            if (run_by_mlx) scope.emplace();
            const auto [y, by_x] = with_gradient([&](const auto& in) { return mixture(in); }, x);
            EXPECT_LE(largest_difference(y, expected.first), tolerance);
            EXPECT_LE(largest_difference(by_x, expected.second), tolerance);
          }
        }
      }
    }
  }
}

// Matrices that are packed alike stay packed where they are joined; others are restored.
TEST(Ops, StackOfPackedMatrices) {
  const MlxOperationsScope scope;
  for (const auto& widths : {std::vector<int>{4, 4}, std::vector<int>{4, 8, 0}}) {
    std::vector<Matrix> single;
    std::vector<mx::array> restored;
    for (const int bits : widths) {
      const auto values = normal({kInner, 64}, restored.size());
      const auto packed = mx::quantize(values, 32, std::max(bits, 4));
      single.push_back(bits > 0 ? Matrix(PackedMatrix{packed[0], packed[1], packed[2], {"affine", 32, bits}}) : Matrix(values));
      restored.push_back(bits > 0 ? mx::dequantize(packed[0], packed[1], packed[2], 32, bits) : values);
    }
    const int count = static_cast<int>(widths.size());
    const MatrixStack stack(std::move(single));
    const auto x = normal({count, 1, 64}, 9), expected = mx::matmul(x, mx::swapaxes(mx::stack(restored, 0), -1, -2));
    for (const bool many : {false, true})
      EXPECT_LE(largest_difference(stack.product(x, mx::arange(count, mx::uint32), many), expected), 1e-4f);
    for (int i = 0; i < count; ++i) {
      std::vector<float> values(kInner * 64);
      restore(stack.stored(i), 64, {0, kInner, 0, 64}, values.data());
      EXPECT_LE(largest_difference(mx::array(values.data(), {kInner, 64}), restored[static_cast<std::size_t>(i)]), 1e-6f);
    }
  }
}

// What is stored in bfloat16 is multiplied by in float32 for many tokens, without such a copy until the gradient.
TEST(Ops, NothingIsKeptOfWeightsInFloat32) {
  constexpr int kSide = 512, kTokens = 2 * kFewTokens;
  const auto values = mx::astype(normal({4 * kSide, kSide}, 1), mx::bfloat16);
  const Matrix plain(values);
  const MatrixStack stack(plain, 4);
  const auto x = normal({kTokens, 1, kSide}, 2), exact = mx::astype(values, mx::float32);
  const auto which = mx::astype(mx::floor_divide(mx::arange(kTokens), mx::array(kTokens / 4)), mx::uint32);
  mx::eval(x, exact, which);
  const MlxOperationsScope scope;
  const auto check = [&](const std::function<mx::array(const mx::array&)>& product, const mx::array& expected) {
    std::size_t kept = 0;
    const auto [outputs, gradients] = mx::vjp(
        [&](const std::vector<mx::array>& in) {
          const std::size_t before = mx::get_active_memory();
          auto y = product(in[0]);
          mx::eval(y);
          kept = mx::get_active_memory() - before;
          return std::vector<mx::array>{y};
        },
        {x}, {mx::ones(expected.shape())});
    EXPECT_LE(largest_difference(outputs[0], expected), 1e-3f);
    EXPECT_LT(kept, exact.nbytes());
    return gradients[0];
  };
  const auto by_plain = check([&](const auto& in) { return plain.product(in); }, mx::matmul(x, mx::transpose(exact)));
  EXPECT_LE(largest_difference(by_plain, mx::broadcast_to(mx::sum(exact, 0), x.shape())), 1e-3f);
  const auto each = mx::reshape(exact, {4, kSide, kSide});
  const auto by_stack = check([&](const auto& in) { return stack.product(in, which, true); },
                              mx::matmul(x, mx::swapaxes(mx::take(each, which, 0), -1, -2)));
  EXPECT_LE(largest_difference(by_stack, mx::expand_dims(mx::take(mx::sum(each, 1), which, 0), 1)), 1e-3f);
}

// Products of few tokens are in the precision of their weights, but for what is measured.
TEST(Ops, FewTokensInFloat32WhereAskedFor) {
  const auto values = mx::astype(normal({48, 64}, 1), mx::bfloat16), x = normal({3, 64}, 2);
  const Matrix matrix(values);
  const auto exact = mx::matmul(x, mx::transpose(mx::astype(values, mx::float32)));
  const MlxOperationsScope scope;
  EXPECT_GT(largest_difference(matrix.product(x), exact), 1e-3f);
  {
    const Float32Scope in_float32;
    EXPECT_LE(largest_difference(matrix.product(x), exact), 1e-4f);
  }
  EXPECT_GT(largest_difference(matrix.product(x), exact), 1e-3f);
}

// What mx::quantize packs is read as it restores it, on our kernels and on MLX's.
TEST(Ops, PackedMatrices) {
  const auto values = normal({24, 64}, 1);
  for (const auto& [mode, bits] : std::vector<std::pair<std::string, int>>{
           {"affine", 2}, {"affine", 3}, {"affine", 4}, {"affine", 5}, {"affine", 6}, {"affine", 8}, {"mxfp4", 4}, {"mxfp8", 8}}) {
    SCOPED_TRACE(mode + " of " + std::to_string(bits));
    const auto packed = mx::quantize(values, 32, bits, mode);
    const auto biases = packed.size() > 2 ? std::optional(packed[2]) : std::nullopt;
    const Matrix matrix(PackedMatrix{packed[0], packed[1], biases, {mode, 32, bits}});
    EXPECT_EQ(matrix.rows(), 24);
    EXPECT_EQ(matrix.columns(), 64);
    const auto restored = mx::dequantize(packed[0], packed[1], biases, 32, bits, mode, std::nullopt, mx::float32);
    EXPECT_LE(largest_difference(mx::array(matrix.floats().data(), {24, 64}), restored), 1e-6f);
    EXPECT_LE(largest_difference(mx::array(matrix.part(3, 9).floats().data(), {6, 64}), mx::slice(restored, {3, 0}, {9, 64})),
              1e-6f);
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
