#include "veloxquant/calibrate/adjoint_plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "tests/model/demo_model.h"
#include "veloxquant/cache/restoring_cache.h"
#include "veloxquant/calibrate/observe.h"
#include "veloxquant/core/parallel.h"
#include "veloxquant/generate/own_text.h"
#include "veloxquant/model/divergence.h"

namespace veloxquant {
namespace {

using testing::demo_model;
using ::testing::HasSubstr;

CalibrationSet small_set() {
  return {generate_own_text(demo_model(), 4, 256, 1), 4, {}, {}};
}

AdjointPlanOptions some_options() {
  return {.bits = 1.5, .context = 2048, .seed = 3};
}

TEST(UnitStatistics, AreThoseOfTheGradients) {
  const auto samples = testing::text_samples(3, 96);
  const StatisticsOptions options{
      .gradients = {.window = 8, .weights = {}, .seed = 5}, .sinks = 4, .training_rows = 60, .held_out_rows = 30};
  const auto store = unit_statistics(demo_model(), samples, options);
  ASSERT_EQ(store.size(), 48u);
  std::vector<LayerGradients> all;
  likelihood_gradients(demo_model(), samples, options.gradients, [&](const LayerGradients& step) { all.push_back(step); });
  for (const std::size_t index : {0u, 3u, 22u, 47u}) {
    const auto unit = store.get(index);
    EXPECT_EQ(unit.layer, static_cast<int>(index / 4));
    EXPECT_EQ(unit.side, index % 4 < 2 ? Side::kKeys : Side::kValues);
    EXPECT_EQ(unit.head, static_cast<int>(index % 2));
    EXPECT_EQ(unit.training.count(), 60u);
    EXPECT_EQ(unit.held_out.count(), 30u);
    SquareMatrix metric(64 * 64);
    std::size_t found = 0;
    for (const auto& step : all) {
      if (step.layer != unit.layer) continue;
      const bool keys = unit.side == Side::kKeys;
      const float *x = (keys ? step.keys : step.values).data<float>(),
                  *g = (keys ? step.key_gradients : step.value_gradients).data<float>();
      for (int b = 0; b < step.keys.shape(0); ++b) {
        for (int t = 4; t < 96; ++t) {
          const std::size_t at = static_cast<std::size_t>((b * 2 + unit.head) * 96 + t) * 64;
          for (std::size_t i = 0; i < 64; ++i)
            for (std::size_t j = 0; j < 64; ++j) metric[i * 64 + j] += static_cast<double>(g[at + i]) * g[at + j] / (3 * 92);
          for (const auto* rows : {&unit.training, &unit.held_out})
            for (std::size_t row = 0; row < rows->count(); ++row)
              found += std::equal(x + at, x + at + 64, rows->vectors.begin() + static_cast<std::ptrdiff_t>(row * 64)) &&
                       std::equal(g + at, g + at + 64, rows->gradients.begin() + static_cast<std::ptrdiff_t>(row * 64));
        }
      }
    }
    EXPECT_GE(found, 90u);  // every row is some position's (layer 0's values repeat with their token)
    const double largest = *std::max_element(metric.begin(), metric.end());
    for (std::size_t i = 0; i < metric.size(); ++i) ASSERT_NEAR(unit.metric[i], metric[i], 1e-4 * largest);
    const auto weights = row_weights(unit.training, unit.metric);
    EXPECT_NEAR(std::accumulate(weights.begin(), weights.end(), 0.0), 60, 1e-3);
  }
  EXPECT_THROW(unit_statistics(demo_model(), testing::text_samples(1, 4), options), std::invalid_argument);
}

UnitStatistics synthetic_unit(double gradient) {
  Random random(7);
  UnitStatistics unit{
      .layer = 0, .side = Side::kKeys, .head = 0, .dim = 16, .metric = SquareMatrix(16 * 16), .training = {}, .held_out = {}};
  for (UnitRows* rows : {&unit.training, &unit.held_out})
    for (int row = 0; row < 600; ++row) {
      rows->samples.push_back(row / 100);
      for (int i = 0; i < 16; ++i) {
        rows->vectors.push_back(static_cast<float>(random.normal()));
        rows->gradients.push_back(static_cast<float>(gradient * random.normal()));
      }
    }
  for (std::size_t i = 0; i < 16; ++i) unit.metric[i * 16 + i] = gradient * gradient;
  return unit;
}

TEST(AdjointCosts, AreHalfTheMeanSquareOfProducts) {
  const auto unit = synthetic_unit(0.1);
  const auto quantizer = quick_fit(unit, Rotation::kFull, 3, 1);
  std::vector<float> restored(unit.held_out.vectors.size());
  make_quantizer(quantizer)->restore(unit.held_out.vectors, restored);
  double sum = 0;
  for (std::size_t row = 0; row < 200; ++row) {  // of the first two samples
    double product = 0;
    for (std::size_t i = row * 16; i < (row + 1) * 16; ++i)
      product += unit.held_out.gradients[i] * (restored[i] - unit.held_out.vectors[i]);
    sum += product * product / 2;
  }
  EXPECT_NEAR(predicted_cost(unit, quantizer, 0, 2), sum / 200, 1e-6 * sum);
  EXPECT_LT(predicted_cost(unit, quantizer, 16, 2), sum / 200);
}

TEST(AdjointCosts, LaddersNeverRise) {
  for (const double gradient : {0.1, 0.0}) {
    const auto unit = synthetic_unit(gradient);
    CostLadder ladder(unit, Rotation::kFull, 1);
    for (int codes = ladder.least_codes(); codes <= ladder.most_codes(); ++codes) {
      for (std::size_t p = 0; p < std::size(kPatchCounts); ++p) {
        const double cost = ladder.cost(codes, kPatchCounts[p]);
        EXPECT_TRUE(gradient > 0 ? cost > 0 : cost == 0);
        if (codes > ladder.least_codes()) {
          EXPECT_LE(cost, ladder.cost(codes - 1, kPatchCounts[p]) * (1 + 1e-12));
        }
        if (p > 0) {
          EXPECT_LE(cost, ladder.cost(codes, kPatchCounts[p - 1]));
        }
      }
    }
    const double before = ladder.cost(2, 0);
    ladder.scale(3);
    EXPECT_DOUBLE_EQ(ladder.cost(2, 0), 3 * before);
  }
}

TEST(AdjointPlan, MeetsItsBudgetAndCoversTheModel) {
  const auto set = small_set();
  const auto made = make_adjoint_plan(demo_model(), set, some_options());
  EXPECT_NO_THROW(check_plan(made.plan));
  EXPECT_LE(effective_bits(made.plan), 1.5);
  EXPECT_GT(effective_bits(made.plan), 1.49);
  EXPECT_EQ(made.plan.window, 32);
  EXPECT_EQ(made.plan.sinks, 4);
  double sum = 0;
  for (const auto& unit : made.plan.units) sum += unit.predicted_kl.value();
  EXPECT_NEAR(made.plan.predicted_kl.value(), sum, 1e-12);
  EXPECT_GT(sum, 0);
  EXPECT_FALSE(made.full_recall);
  ASSERT_GT(made.frontier.size(), 10u);
  EXPECT_TRUE(
      std::is_sorted(made.frontier.begin(), made.frontier.end(), [](const auto& a, const auto& b) { return a.bits < b.bits; }));

  // Stored so, the model says nearly the same.
  const auto tokens = token_array(generate_own_text(demo_model(), 1, 256, 2), 0, 1);
  const auto full = demo_model().forward(tokens, demo_model().make_caches(FullCache::factory())),
             stored = demo_model().forward(tokens, demo_model().make_caches(restoring_factory(made.plan)));
  const auto scores = score_hidden(demo_model(), {full, stored}, {})[1];
  double kl = 0;
  for (const auto& position : scores) kl += position.kl / static_cast<double>(scores.size());
  EXPECT_GT(kl, 0);
  EXPECT_LT(kl, 0.05);

  const int threads = num_threads();
  set_num_threads(1);
  EXPECT_EQ(make_adjoint_plan(demo_model(), set, some_options()).plan, made.plan);
  set_num_threads(threads);
}

TEST(AdjointPlan, UnitsShareWidthsAsAsked) {
  const auto set = small_set();
  double finer = 0;
  for (const Units units : {Units::kHead, Units::kKv, Units::kLayer, Units::kUniform}) {
    auto options = some_options();
    options.units = units;
    const auto made = make_adjoint_plan(demo_model(), set, options);
    const auto same = [&](std::size_t a, std::size_t b) {
      return made.plan.units[a].quantizer.numbers.at("codes") == made.plan.units[b].quantizer.numbers.at("codes");
    };
    for (std::size_t i = 0; i < 48; i += 4) {
      if (units != Units::kHead) {
        EXPECT_TRUE(same(i, i + 1) && same(i + 2, i + 3));
      }
      if (units == Units::kLayer || units == Units::kUniform) {
        EXPECT_TRUE(same(i, i + 2));
      }
      if (units == Units::kUniform) {
        EXPECT_TRUE(same(0, i));
      }
    }
    // The hull of finer units lies below.
    const auto at = [&](double bits) {
      return std::lower_bound(made.frontier.begin(), made.frontier.end(), bits,
                              [](const auto& point, double b) { return point.bits < b; })
          ->predicted_kl;
    };
    EXPECT_GE(at(2.0), 0.9 * finer);
    finer = at(2.0);
  }
}

TEST(AdjointPlan, RefusesWhatCannotBe) {
  const auto problem = [](AdjointPlanOptions options, int length = 256) {
    try {
      check_adjoint_plan_options(demo_model().config(), options, length);
    } catch (const std::invalid_argument& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_EQ(problem({.bits = 2}), "");
  EXPECT_THAT(problem({.bits = 9}), HasSubstr("bits: possible are"));
  EXPECT_THAT(problem({.bits = 0.1}), HasSubstr("got 0.1"));
  EXPECT_THAT(problem({.bits = std::numeric_limits<double>::quiet_NaN()}), HasSubstr("got nan"));
  EXPECT_THAT(problem({.bytes = 5}), HasSubstr("bytes: possible are"));
  EXPECT_THAT(problem({.context = 36}), HasSubstr("more than the 36 tokens"));
  EXPECT_THAT(problem({.bits = 2}, 36), HasSubstr("longer than the 36 tokens"));
  auto config = demo_model().config();
  config.ropes[0].dims = 32;
  EXPECT_NO_THROW(check_adjoint_plan_options(config, {.bits = 2}, 256));
  EXPECT_THROW(check_adjoint_plan_options(config, {.bits = 2, .keys = Rotation::kPlane}, 256), std::invalid_argument);
}

double rank_correlation(const std::vector<double>& a, const std::vector<double>& b) {
  const auto ranks = [](const std::vector<double>& x) {
    std::vector<std::size_t> order(x.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::sort(order.begin(), order.end(), [&](std::size_t i, std::size_t j) { return x[i] < x[j]; });
    std::vector<double> rank(x.size());
    for (std::size_t i = 0; i < order.size(); ++i) rank[order[i]] = static_cast<double>(i);
    return rank;
  };
  const auto x = ranks(a), y = ranks(b);
  double squares = 0;
  for (std::size_t i = 0; i < x.size(); ++i) squares += (x[i] - y[i]) * (x[i] - y[i]);
  const auto n = static_cast<double>(x.size());
  return 1 - 6 * squares / (n * (n * n - 1));
}

struct Amounts {
  int length, samples, training_rows, held_out_rows, read, step;
};

// Pooled over units and widths: predicted costs against the KL of storing the unit alone.
double predicted_against_measured(int window, const Amounts& amounts) {
  const auto& [length, count, training_rows, held_out_rows, read, step] = amounts;
  const int sinks = window > 0 ? 4 : 0;
  const auto samples = generate_own_text(demo_model(), count, length, 1);
  const auto store = unit_statistics(demo_model(), samples,
                                     {.gradients = {.window = window, .weights = {}, .seed = 1},
                                      .sinks = sinks,
                                      .training_rows = static_cast<std::size_t>(training_rows),
                                      .held_out_rows = static_cast<std::size_t>(held_out_rows)});
  const auto tokens = token_array(samples, 0, read);
  const auto full = demo_model().forward(tokens, demo_model().make_caches(FullCache::factory()));
  std::vector<double> predicted, measured;
  const Restore as_it_is{[](const mx::array& x) { return x; }};
  for (std::size_t i = 0; i < store.size(); i += static_cast<std::size_t>(step)) {
    const auto unit = store.get(i);
    for (const int codes : {2, 8, 24}) {
      const auto quantizer = quick_fit(unit, Rotation::kFull, codes, 1);
      predicted.push_back(predicted_cost(unit, quantizer, 0, samples.count));
      std::vector<std::optional<QuantizerParameters>> heads(2);
      heads[static_cast<std::size_t>(unit.head)] = quantizer;
      const Restore restore = make_restore(heads);
      const bool keys = unit.side == Side::kKeys;
      const auto stored = demo_model().forward(tokens, demo_model().make_caches([&](int layer) -> std::unique_ptr<AttentionCache> {
        if (layer != unit.layer) return std::make_unique<FullCache>();
        return std::make_unique<RestoringCache>(keys ? restore : as_it_is, keys ? as_it_is : restore,
                                                ExactTokens{window, sinks, /* eight_bits= */ false});
      }));
      double kl = 0;
      for (int row = 0; row < read; ++row) {
        const auto of = [&](const mx::array& x) { return mx::slice(x, {row, 0, 0}, {row + 1, length, x.shape(2)}); };
        const auto scores = score_hidden(demo_model(), {of(full), of(stored)}, {});
        for (const auto& position : scores[1]) kl += position.kl;
      }
      measured.push_back(kl);
    }
  }
  return rank_correlation(predicted, measured);
}

// One backward pass ranks units and widths as measuring each of them does (docs/design.md); VELOXQUANT_SLOW reads enough for the
// figures in docs/results.md.
TEST(AdjointPrediction, RanksUnitsAndWidthsAsMeasuringDoes) {
  const bool slow = std::getenv("VELOXQUANT_SLOW") != nullptr;
  const Amounts amounts = slow ? Amounts{1024, 64, 8192, 57344, 12, 2} : Amounts{512, 16, 4000, 4000, 2, 5};
  for (const int window : slow ? std::vector{0, 32} : std::vector{32}) {
    const double correlation = predicted_against_measured(window, amounts);
    RecordProperty("spearman_window_" + std::to_string(window), std::to_string(correlation));
    EXPECT_GE(correlation, slow ? (window == 0 ? 0.98 : 0.965) : 0.85) << "window " << window;
  }
}

}  // namespace
}  // namespace veloxquant
