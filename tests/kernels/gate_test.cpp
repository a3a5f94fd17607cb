#include "veloxquant/kernels/gate.h"

#include <cmath>
#include <numbers>

#include "tests/kernels/every_target.h"

namespace veloxquant {
namespace {

using testing::normal_values;

constexpr Activation kActivations[] = {Activation::kSilu, Activation::kGelu};

std::vector<float> gated(Activation activation, const std::vector<float>& joined, std::size_t dim) {
  std::vector<float> out(joined.size() / 2);
  gate_joined(activation, joined.data(), out.data(), out.size() / dim, dim);
  return out;
}

std::vector<float> expected(Activation activation, const std::vector<float>& joined, std::size_t dim) {
  std::vector<float> out(joined.size() / 2);
  reference::gate_joined(activation, joined.data(), out.data(), out.size() / dim, dim);
  return out;
}

TEST(Gate, EqualsReferenceAtOddSizes) {
  testing::for_each_target([] {
    for (const auto activation : kActivations) {
      for (const std::size_t dim : {1, 2, 3, 7, 63, 64, 65, 129, 1000}) {
        for (const std::size_t rows : {1, 2, 5}) {
          SCOPED_TRACE(dim);
          const auto joined = normal_values(rows * 2 * dim, dim, 4.0);
          testing::expect_near(gated(activation, joined, dim), expected(activation, joined, dim), 1e-7, 1e-6);
        }
      }
    }
  });
}

TEST(Gate, BackwardEqualsReferenceAtOddSizes) {
  testing::for_each_target([] {
    for (const auto activation : kActivations) {
      for (const std::size_t dim : {1, 2, 3, 7, 63, 64, 65, 129, 1000}) {
        SCOPED_TRACE(dim);
        const auto joined = normal_values(3 * 2 * dim, dim, 4.0), grad_out = normal_values(3 * dim, dim + 1);
        std::vector<float> actual(joined.size()), expected(joined.size());
        gate_joined_backward(activation, joined.data(), grad_out.data(), actual.data(), 3, dim);
        reference::gate_joined_backward(activation, joined.data(), grad_out.data(), expected.data(), 3, dim);
        testing::expect_near(actual, expected, 2e-6, 2e-6);
      }
    }
  });
}

TEST(Gate, GradientIsTheSlope) {
  for (const auto activation : kActivations) {
    auto joined = normal_values(2 * 5, 1);
    const auto grad_out = normal_values(5, 2);
    std::vector<float> gradient(10);
    gate_joined_backward(activation, joined.data(), grad_out.data(), gradient.data(), 1, 5);
    const auto loss = [&] {
      const auto out = expected(activation, joined, 5);
      double sum = 0;
      for (std::size_t i = 0; i < 5; ++i) sum += static_cast<double>(out[i]) * grad_out[i];
      return sum;
    };
    for (std::size_t i = 0; i < 10; ++i) {
      const float before = joined[i], step = 1e-2f;
      joined[i] = before + step;
      const double above = loss();
      joined[i] = before - step;
      const double below = loss();
      joined[i] = before;
      EXPECT_NEAR(gradient[i], (above - below) / (2 * step), 1e-3) << "at " << i;
    }
  }
}

// e^−gate leaves the range of float below −88, and that of Highway's Exp below −104; cubes do from 1e13.
TEST(Gate, ExtremeGates) {
  const std::vector<float> gates = {-1e30f, -1e4f,   -500, -289,   -200, -177, -150, -105, -103, -89, -88,  -87,  -30,
                                    -1,     -1e-30f, 0,    1e-30f, 1,    30,   88,   89,   104,  200, 1e4f, 1e30f};
  testing::for_each_target([&] {
    for (const auto activation : kActivations) {
      for (const std::size_t dim : {std::size_t{1}, gates.size()}) {  // one: the scalar tail
        std::vector<float> joined;
        for (std::size_t i = 0; i < gates.size(); i += dim) {
          joined.insert(joined.end(), gates.begin() + static_cast<std::ptrdiff_t>(i),
                        gates.begin() + static_cast<std::ptrdiff_t>(i + dim));
          joined.insert(joined.end(), dim, 1.0f);
        }
        const auto out = gated(activation, joined, dim);
        std::vector<float> slopes(joined.size());
        const std::vector<float> ones(gates.size(), 1.0f);
        gate_joined_backward(activation, joined.data(), ones.data(), slopes.data(), gates.size() / dim, dim);
        for (std::size_t i = 0; i < gates.size(); ++i) {
          const double x = gates[i],
                       a = activation == Activation::kSilu ? x : std::sqrt(8 / std::numbers::pi) * (x + 0.044715 * x * x * x),
                       value = x / (1 + std::exp(-a));
          EXPECT_NEAR(out[i], value, 1e-7 + 1e-6 * std::abs(value)) << "gate " << x;
          if (std::abs(x) < 200) continue;
          EXPECT_NEAR(slopes[i / dim * 2 * dim + i % dim], x > 0 ? 1 : 0, 1e-6) << "gate " << x;
        }
      }
    }
  });
}

TEST(Gate, SameBitsOnAnyThreads) {
  const auto joined = normal_values(400 * 2 * 257, 3);
  for (const auto activation : kActivations) testing::expect_same_on_any_threads([&] { return gated(activation, joined, 257); });
}

}  // namespace
}  // namespace veloxquant
