#include "veloxquant/kernels/attention.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "tests/kernels/every_target.h"

namespace veloxquant {
namespace {

using testing::normal_values;

enum class Layout { kHeadMajor, kTokenMajor };

// An array [batch, heads, tokens, dim] with a gap after each token's or vector's values.
template <class T>
Strided<T> view_of(T* data, std::size_t heads, std::size_t tokens, std::size_t dim, Layout layout) {
  const auto h = static_cast<std::ptrdiff_t>(heads), t = static_cast<std::ptrdiff_t>(tokens), d = static_cast<std::ptrdiff_t>(dim);
  if (layout == Layout::kHeadMajor) return {data, h * t * (d + 1), t * (d + 1), d + 1};
  return {data, t * (h * d + 3), d, h * d + 3};
}

std::size_t size_of(std::size_t batch, std::size_t heads, std::size_t tokens, std::size_t dim, Layout layout) {
  return layout == Layout::kHeadMajor ? batch * heads * tokens * (dim + 1) : batch * tokens * (heads * dim + 3);
}

struct Problem {
  AttentionShape shape;
  AttentionRule rule;
  Layout layout;
  std::vector<float> q, k, v, grad_out, near_k, near_v;
  NearKeys near;

  Problem(const AttentionShape& shape, Layout layout, double spread = 1.0)
      : shape(shape),
        rule{.scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim))},
        layout(layout),
        q(normal_values(query_size(), 1, spread)),
        k(normal_values(key_size(), 2, spread)),
        v(normal_values(key_size(), 3)),
        grad_out(normal_values(query_size(), 4)) {}

  std::size_t query_size() const { return size_of(shape.batch, shape.query_heads, shape.query_tokens, shape.head_dim, layout); }
  std::size_t key_size() const { return size_of(shape.batch, shape.kv_heads, shape.key_tokens, shape.head_dim, layout); }

  template <class T>
  Strided<T> query_view(T* data) const {
    return view_of(data, shape.query_heads, shape.query_tokens, shape.head_dim, layout);
  }
  template <class T>
  Strided<T> key_view(T* data) const {
    return view_of(data, shape.kv_heads, shape.key_tokens, shape.head_dim, layout);
  }

  std::size_t near_size() const { return size_of(shape.batch, shape.kv_heads, near.tokens, shape.head_dim, layout); }

  template <class T>
  Strided<T> near_view(T* data) const {
    return view_of(data, shape.kv_heads, near.tokens, shape.head_dim, layout);
  }

  // Near keys and values unlike the far ones; `more` tokens than are needed.
  void read_near(std::size_t window, std::size_t more = 0) {
    near.window = window;
    near.tokens = std::min(shape.key_tokens, window + shape.query_tokens - 1 + more);
    near_k = normal_values(near_size(), 5);
    near_v = normal_values(near_size(), 6);
    near.k = near_view(std::as_const(near_k).data());
    near.v = near_view(std::as_const(near_v).data());
  }

  // Near ones that equal the far ones.
  void read_far_as_near(std::size_t window) {
    near.window = window;
    near.tokens = std::min(shape.key_tokens, window + shape.query_tokens - 1);
    near.k = key_view(std::as_const(k).data());
    near.v = key_view(std::as_const(v).data());
    for (StridedView* x : {&near.k, &near.v}) x->data = x->at(0, 0, shape.key_tokens - near.tokens);
  }

  // The output, then the logarithms of the sums.  Gaps of the output keep the −7 that they start with, or the comparison fails.
  template <class Attention>
  std::vector<float> attend(Attention attention) const {
    std::vector<float> out(query_size(), -7.0f), log_sums(shape.batch * shape.query_heads * shape.query_tokens, -7.0f);
    attention(shape, rule, query_view(q.data()), key_view(k.data()), key_view(v.data()), query_view(out.data()), log_sums.data(),
              near);
    out.insert(out.end(), log_sums.begin(), log_sums.end());
    return out;
  }

  std::vector<float> actual() const { return attend(causal_attention); }
  std::vector<float> expected() const { return attend(reference::causal_attention); }

  // The gradients by q, k, v and near's k and v, one after another; gaps as above.
  template <class Attention>
  std::vector<float> gradients(Attention attention) const {
    const auto out = expected();
    std::vector<float> by_q(query_size(), -7.0f), by_k(key_size(), -7.0f), by_v(key_size(), -7.0f), by_near_k(near_size(), -7.0f),
        by_near_v(near_size(), -7.0f);
    attention(shape, rule, query_view(q.data()), key_view(k.data()), key_view(v.data()), query_view(out.data()),
              out.data() + query_size(), query_view(grad_out.data()), query_view(by_q.data()), key_view(by_k.data()),
              key_view(by_v.data()), near, near_view(by_near_k.data()), near_view(by_near_v.data()));
    for (const auto* by : {&by_k, &by_v, &by_near_k, &by_near_v}) by_q.insert(by_q.end(), by->begin(), by->end());
    return by_q;
  }

  void expect_equals_reference(double spread = 1.0) const {
    SCOPED_TRACE(::testing::Message() << "B " << shape.batch << " Hq " << shape.query_heads << " Hkv " << shape.kv_heads << " T "
                                      << shape.query_tokens << " S " << shape.key_tokens << " D " << shape.head_dim << " cap "
                                      << rule.soft_cap << " window " << rule.window << " near " << near.window << " of "
                                      << near.tokens);
    // Scores grow with the square of the spread, and their rounding moves weights by as much.
    testing::expect_near(actual(), expected(), 3e-6 * std::max(1.0, spread * spread), 1e-6);
    // A gradient by a key sums over all queries of its group.
    const double scale = std::sqrt(static_cast<double>(shape.query_tokens * shape.query_heads / shape.kv_heads));
    testing::expect_near(gradients(causal_attention_backward), gradients(reference::causal_attention_backward),
                         5e-6 * scale * std::max(1.0, spread * spread * spread), 1e-5);
  }
};

void expect_equals_reference(const AttentionShape& shape, Layout layout = Layout::kHeadMajor, double spread = 1.0) {
  Problem(shape, layout, spread).expect_equals_reference(spread);
}

TEST(Attention, EveryHeadDim) {
  testing::for_each_target([] {
    for (const std::size_t dim : {1, 4, 7, 32, 64, 80, 128, 256}) {
      expect_equals_reference({1, 2, 1, 1, 65, dim});
      expect_equals_reference({1, 2, 1, 67, 67, dim});
    }
  });
}

// Around the borders of the blocks (128 queries, 256 keys) and of the path for few queries.
TEST(Attention, EveryNumberOfQueriesAndKeys) {
  for (const std::size_t queries : {1, 2, 3, 4, 5, 7, 8, 9, 63, 64, 65, 127, 128, 129, 300})
    for (const std::size_t before : {0, 1, 63, 255, 256, 257, 600})
      expect_equals_reference({1, 2, 2, queries, before + queries, 8});
}

TEST(Attention, GroupsOfHeadsAndBatches) {
  testing::for_each_target([] {
    for (const std::size_t queries : {1, 4, 70}) {
      for (const Layout layout : {Layout::kHeadMajor, Layout::kTokenMajor}) {
        expect_equals_reference({3, 6, 2, queries, 300, 16}, layout);
        expect_equals_reference({2, 4, 4, queries, 131, 20}, layout);
        expect_equals_reference({1, 7, 1, queries, 131, 20}, layout);
      }
    }
  });
}

// One query of one head over many keys: work is shared out along the keys.
TEST(Attention, LongContext) {
  testing::for_each_target([] {
    for (const std::size_t keys : {1023, 2047, 2048, 2049, 5000}) {
      expect_equals_reference({1, 4, 1, 1, keys, 32});
      expect_equals_reference({1, 2, 1, 3, keys, 32}, Layout::kTokenMajor);
    }
  });
}

TEST(Attention, LargeScores) {
  testing::for_each_target([] {
    expect_equals_reference({1, 2, 1, 1, 700, 64}, Layout::kHeadMajor, 20.0);
    expect_equals_reference({1, 2, 1, 150, 700, 64}, Layout::kHeadMajor, 20.0);
  });
}

// The maximum moves in every block, so that everything summed before is scaled down, at the end to nothing.
TEST(Attention, RisingScores) {
  for (const std::size_t queries : {1, 40}) {
    Problem problem({1, 1, 1, queries, 1500, 4}, Layout::kHeadMajor);
    std::fill(problem.q.begin(), problem.q.end(), 1.0f);
    for (std::size_t s = 0; s < 1500; ++s)
      std::fill_n(problem.k.begin() + static_cast<std::ptrdiff_t>(5 * s), 4, 0.2f * static_cast<float>(s));
    testing::expect_near(problem.actual(), problem.expected(), 2e-4);
  }
}

TEST(Attention, SoftCaps) {
  testing::for_each_target([] {
    for (const std::size_t queries : {1, 3, 150}) {
      Problem problem({2, 4, 2, queries, 300, 20}, Layout::kTokenMajor, 3.0);
      problem.rule.soft_cap = 5.0f;
      problem.expect_equals_reference(3.0);
    }
  });
}

TEST(Attention, Windows) {
  testing::for_each_target([] {
    for (const std::size_t window : {1, 2, 31, 256, 257, 500}) {
      for (const std::size_t queries : {1, 4, 200, 600}) {
        Problem problem({1, 2, 1, queries, 600, 12}, Layout::kHeadMajor);
        problem.rule.window = window;
        problem.expect_equals_reference();
      }
    }
  });
}

// The second sequence is padding throughout: its queries see nothing, and give and get nothing.
TEST(Attention, Padding) {
  const std::int32_t padding[] = {0, 400, 257, 1};
  testing::for_each_target([&] {
    for (const std::size_t queries : {1, 4, 150, 400}) {
      for (const std::size_t window : {0, 100}) {
        Problem problem({4, 2, 2, queries, 400, 12}, Layout::kTokenMajor);
        problem.rule.padding = padding;
        problem.rule.window = window;
        problem.expect_equals_reference();
        const auto out = problem.actual();
        const std::size_t sequence = queries * (2 * 12 + 3);
        for (std::size_t t = 0; t < queries; ++t) EXPECT_EQ(out[sequence + t * (2 * 12 + 3)], 0.0f);
      }
    }
  });
}

// Against differences of the output itself.
void expect_gradient_is_slope(Problem& problem) {
  problem.rule.soft_cap = 2.0f;
  const auto loss = [&] {
    const auto out = problem.expected();
    double sum = 0;
    for (std::size_t i = 0; i < problem.query_size(); ++i)
      if (out[i] != -7.0f) sum += static_cast<double>(out[i]) * problem.grad_out[i];
    return sum;
  };
  const auto gradients = problem.gradients(reference::causal_attention_backward);
  const auto check = [&](std::vector<float>& x, std::size_t first) {
    for (std::size_t i = 0; i < x.size(); ++i) {
      if (gradients[first + i] == -7.0f) continue;
      const float before = x[i], step = 1e-2f;
      x[i] = before + step;
      const double above = loss();
      x[i] = before - step;
      const double below = loss();
      x[i] = before;
      EXPECT_NEAR(gradients[first + i], (above - below) / (2 * step), 2e-3) << "at " << first + i;
    }
  };
  check(problem.q, 0);
  check(problem.k, problem.query_size());
  check(problem.v, problem.query_size() + problem.key_size());
  check(problem.near_k, problem.query_size() + 2 * problem.key_size());
  check(problem.near_v, problem.query_size() + 2 * problem.key_size() + problem.near_k.size());
}

TEST(Attention, GradientIsTheSlope) {
  Problem problem({1, 2, 1, 5, 9, 3}, Layout::kHeadMajor);
  expect_gradient_is_slope(problem);
}

TEST(Attention, NoQuerySeesLaterTokens) {
  for (const std::size_t queries : {3, 90}) {
    Problem problem({1, 2, 1, queries, 310, 8}, Layout::kHeadMajor);
    const auto before = problem.actual();
    std::fill(problem.k.end() - 9, problem.k.end(), 1e3f);  // the last token, which the last query alone sees
    std::fill(problem.v.end() - 9, problem.v.end(), 1e3f);
    const auto after = problem.actual();
    for (std::size_t h = 0; h < 2; ++h)
      for (std::size_t t = 0; t < queries; ++t) {
        const auto begin = static_cast<std::ptrdiff_t>((h * queries + t) * 9);
        EXPECT_EQ(std::equal(before.begin() + begin, before.begin() + begin + 8, after.begin() + begin), t + 1 < queries)
            << "query " << t;
      }
  }
}

TEST(Attention, SameBitsOnAnyThreads) {
  for (const std::size_t queries : {1, 4, 300}) {
    const Problem problem({1, 6, 2, queries, 2100, 24}, Layout::kTokenMajor);
    testing::expect_same_on_any_threads([&] { return problem.actual(); });
    testing::expect_same_on_any_threads([&] { return problem.gradients(causal_attention_backward); });
  }
}

// Around the borders of the blocks, up to windows that hold every key.
TEST(NearKeys, EveryWindow) {
  testing::for_each_target([] {
    for (const std::size_t window : {1, 2, 31, 127, 128, 129, 256, 257, 1000})
      for (const std::size_t queries : {1, 4, 5, 130, 301})
        for (const std::size_t before : {0, 1, 300}) {
          Problem problem({1, 2, 1, queries, before + queries, 7}, Layout::kHeadMajor);
          problem.read_near(window, window % 2 * 40);
          problem.expect_equals_reference();
        }
  });
}

TEST(NearKeys, GroupsOfHeadsAndBatches) {
  testing::for_each_target([] {
    for (const std::size_t queries : {1, 70, 300})
      for (const Layout layout : {Layout::kHeadMajor, Layout::kTokenMajor}) {
        Problem problem({3, 6, 2, queries, 300, 16}, layout);
        problem.read_near(32, 9);
        problem.expect_equals_reference();
      }
  });
}

TEST(NearKeys, LongContext) {
  testing::for_each_target([] {
    for (const std::size_t queries : {1, 600}) {
      Problem problem({1, 2, 1, queries, 2100, 8}, Layout::kTokenMajor);
      problem.read_near(33);
      problem.expect_equals_reference();
    }
  });
}

// A sliding window that hides all far keys, that ends among them, and none; sequences that are partly or all padding.
TEST(NearKeys, WindowsPaddingAndSoftCaps) {
  const std::int32_t padding[] = {0, 400, 257, 1};
  testing::for_each_target([&] {
    for (const std::size_t window : {1, 40, 300})
      for (const std::size_t sliding : {0, 39, 40, 170})
        for (const std::size_t queries : {1, 6, 150, 400}) {
          Problem problem({4, 2, 1, queries, 400, 9}, Layout::kTokenMajor);
          problem.rule.window = sliding;
          problem.rule.soft_cap = sliding % 2 == 0 ? 0.0f : 2.0f;
          problem.rule.padding = queries == 6 ? nullptr : padding;
          problem.read_near(window);
          problem.expect_equals_reference();
        }
  });
}

// Copies change nothing: the same output, and gradients that add up to the same.
TEST(NearKeys, CopiesOfTheFarOnes) {
  for (const std::size_t window : {1, 32, 300, 1000})
    for (const std::size_t queries : {1, 200, 700}) {
      SCOPED_TRACE(::testing::Message() << "window " << window << " T " << queries);
      Problem problem({2, 4, 2, queries, 700, 16}, Layout::kHeadMajor);
      const auto plain = problem.actual(), plain_gradients = problem.gradients(causal_attention_backward);
      problem.read_far_as_near(window);
      testing::expect_near(problem.actual(), plain, 3e-6, 1e-6);

      auto gradients = problem.gradients(causal_attention_backward);
      const std::vector<float> of_near(gradients.begin() + static_cast<std::ptrdiff_t>(plain_gradients.size()), gradients.end());
      gradients.resize(plain_gradients.size());
      float* far = gradients.data() + problem.query_size();
      const float* near = of_near.data();
      for (int i = 0; i < 2; ++i, far += problem.key_size(), near += problem.near_size())
        for (std::size_t b = 0; b < 2; ++b)
          for (std::size_t h = 0; h < 2; ++h)
            for (std::size_t t = 0; t < problem.near.tokens; ++t) {
              float* sum = problem.key_view(far).at(b, h, 700 - problem.near.tokens + t);
              const float* more = problem.near_view(near).at(b, h, t);
              std::transform(sum, sum + 16, more, sum, [](float x, float y) { return x + y; });
            }
      testing::expect_near(gradients, plain_gradients, 1e-4, 1e-5);
    }
}

TEST(NearKeys, GradientIsTheSlope) {
  Problem problem({1, 2, 1, 5, 9, 3}, Layout::kHeadMajor);
  problem.read_near(3, 1);
  expect_gradient_is_slope(problem);
}

TEST(NearKeys, SameBitsOnAnyThreads) {
  for (const std::size_t queries : {1, 300}) {
    Problem problem({1, 6, 2, queries, 2100, 24}, Layout::kTokenMajor);
    problem.read_near(40);
    testing::expect_same_on_any_threads([&] { return problem.actual(); });
    testing::expect_same_on_any_threads([&] { return problem.gradients(causal_attention_backward); });
  }
}

}  // namespace
}  // namespace veloxquant
