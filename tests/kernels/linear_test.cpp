#include "veloxquant/kernels/linear.h"

#include <numeric>
#include <optional>

#include "tests/kernels/every_target.h"

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

TEST(Linear, SameBitsOnAnyThreads) {
  for (const std::size_t rows : {1, 32, 700}) {
    const Problem problem(rows, 64, {256, 128});
    testing::expect_same_on_any_threads([&] { return problem.mapped(linear, true, true); });
    testing::expect_same_on_any_threads([&] { return problem.gradient(linear_backward); });
  }
}

}  // namespace
}  // namespace veloxquant
