#include "veloxquant/kernels/linear.h"

#include <numeric>
#include <optional>
#include <stdexcept>
#include <tuple>

#include "tests/kernels/every_target.h"
#include "tests/kernels/stored_problem.h"

namespace veloxquant {
namespace {

using testing::normal_values;

struct Problem {
  std::size_t rows, in;
  std::vector<std::size_t> outs;
  std::vector<std::vector<float>> weights, biases;
  std::vector<float> x, residual, grad_y;

  Problem(std::size_t rows, std::size_t in, std::vector<std::size_t> outs)
      : rows(rows),
        in(in),
        outs(std::move(outs)),
        x(normal_values(rows * in, 1)),
        residual(normal_values(rows * width(), 2)),
        grad_y(normal_values(rows * width(), 3)) {
    for (const std::size_t out : this->outs) {
      weights.push_back(normal_values(out * in, 10 + weights.size()));
      biases.push_back(normal_values(out, 20 + weights.size()));
    }
  }

  std::size_t width() const { return std::accumulate(outs.begin(), outs.end(), std::size_t{0}); }

  // Every second map has a bias, from the first one on if asked for.
  std::vector<LinearMap> maps(bool first_biased) const {
    std::vector<LinearMap> maps;
    for (std::size_t i = 0; i < outs.size(); ++i)
      maps.push_back({weights[i].data(), (i % 2 == 0) == first_biased ? biases[i].data() : nullptr, outs[i]});
    return maps;
  }

  template <class Map>
  std::vector<float> mapped(Map map, bool first_biased, bool with_residual) const {
    std::vector<float> y(rows * width());
    map(x.data(), rows, in, maps(first_biased), with_residual ? residual.data() : nullptr, y.data());
    return y;
  }

  template <class Map>
  std::vector<float> gradient(Map map) const {
    std::vector<float> grad_x(rows * in);
    map(grad_y.data(), rows, in, maps(false), grad_x.data());
    return grad_x;
  }
};

// Around the borders of the few rows' own product (48), of blocks and of tiles.
TEST(Linear, EqualsReferenceAtOddSizes) {
  for (const std::size_t rows : {1, 2, 3, 31, 47, 48, 127, 128, 129, 255, 256, 257, 600}) {
    for (const auto& outs : {std::vector<std::size_t>{1}, {130}, {64, 32, 33}}) {
      const Problem problem(rows, 37, outs);
      for (const bool biased : {false, true})
        for (const bool residual : {false, true})
          testing::expect_near(problem.mapped(linear, biased, residual), problem.mapped(reference::linear, biased, residual), 2e-5,
                               1e-6);
      testing::expect_near(problem.gradient(linear_backward), problem.gradient(reference::linear_backward), 4e-5, 1e-6);
    }
  }
}

TEST(Linear, FewRowsOnEveryTarget) {
  testing::for_each_target([] {
    for (const std::size_t rows : {1, 3, 4, 7, 32, 47}) {
      for (const std::size_t in : {1, 15, 16, 17, 64, 100}) {
        const Problem problem(rows, in, {5, 130});
        testing::expect_near(problem.mapped(linear, true, true), problem.mapped(reference::linear, true, true), 2e-5, 1e-6);
      }
    }
  });
}

// Weights as files store them: few rows, many, more columns and rows than a piece that is restored for BLAS, parts of it that are
// not whole, and gradients.
TEST(Linear, StoredWeights) {
  for (const auto& form : testing::stored_forms()) {
    SCOPED_TRACE(testing::form_text(form));
    for (const auto& [rows, in, out] :
         {std::tuple<std::size_t, std::size_t, std::size_t>{1, 384, 203}, {50, 384, 203}, {48, 1152, 515}}) {
      if (out > 500 && form.bits != 16 && form.bits != 4) continue;  // the reference takes its time
      const testing::StoredProblem weight(form, out, in, 1), second(form, 9, in, 2);
      const auto x = normal_values(rows * in, 3), residual = normal_values(rows * (out + 9), 4);
      const std::vector<LinearMap> maps = {{weight.matrix(), nullptr, out}, {second.matrix(), nullptr, 9}};
      std::vector<float> ours(rows * (out + 9)), expected(ours), by_x(x.size()), expected_by_x(x.size());
      for (const float* added : {static_cast<const float*>(nullptr), residual.data()}) {
        linear(x.data(), rows, in, maps, added, ours.data());
        reference::linear(x.data(), rows, in, maps, added, expected.data());
        testing::expect_near(ours, expected, 2e-4, 1e-6);
      }
      linear_backward(residual.data(), rows, in, maps, by_x.data());
      reference::linear_backward(residual.data(), rows, in, maps, expected_by_x.data());
      testing::expect_near(by_x, expected_by_x, 2e-4, 1e-6);
    }
  }
}

TEST(Linear, FewRowsOfStoredWeightsOnEveryTarget) {
  testing::for_each_target([] {
    for (const auto& form : testing::stored_forms()) {
      SCOPED_TRACE(testing::form_text(form));
      for (const std::size_t rows : {1, 2, 3, 4, 5, 12}) {
        for (const std::size_t in : {1, 17, 37, 128, 160}) {
          if (form.packed() && in % form.group_size != 0) continue;
          const testing::StoredProblem weight(form, 67, in, rows);
          const auto x = normal_values(rows * in, 3);
          const LinearMap map{weight.matrix(), nullptr, 67};
          std::vector<float> ours(rows * 67), expected(ours);
          linear(x.data(), rows, in, {&map, 1}, nullptr, ours.data());
          reference::linear(x.data(), rows, in, {&map, 1}, nullptr, expected.data());
          testing::expect_near(ours, expected, 5e-5, 1e-6);
        }
      }
    }
  });
}

TEST(Linear, RefusesWeightsOfOtherColumns) {
  const testing::StoredProblem weight({ElementType::kAffine, 4, 64, ElementType::kFloat16}, 4, 64, 1);
  const LinearMap map{weight.matrix(), nullptr, 4};
  std::vector<float> x(100), y(100);
  EXPECT_THROW(linear(x.data(), 1, 65, {&map, 1}, nullptr, y.data()), std::invalid_argument);
  EXPECT_THROW(linear_backward(x.data(), 1, 65, {&map, 1}, y.data()), std::invalid_argument);
}

TEST(Linear, SameBitsOnAnyThreads) {
  for (const std::size_t rows : {1, 32, 700}) {
    const Problem problem(rows, 64, {256, 128});
    testing::expect_same_on_any_threads([&] { return problem.mapped(linear, true, true); });
    testing::expect_same_on_any_threads([&] { return problem.gradient(linear_backward); });
  }
}

}  // namespace
}  // namespace veloxquant
