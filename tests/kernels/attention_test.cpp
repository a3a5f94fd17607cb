#include "veloxquant/kernels/attention.h"

#include <algorithm>
#include <cmath>

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
  float scale;
  Layout layout;
  std::vector<float> q, k, v;

  Problem(const AttentionShape& shape, Layout layout, double spread = 1.0)
      : shape(shape),
        scale(1.0f / std::sqrt(static_cast<float>(shape.head_dim))),
        layout(layout),
        q(normal_values(query_size(), 1, spread)),
        k(normal_values(key_size(), 2, spread)),
        v(normal_values(key_size(), 3)) {}

  std::size_t query_size() const { return size_of(shape.batch, shape.query_heads, shape.query_tokens, shape.head_dim, layout); }
  std::size_t key_size() const { return size_of(shape.batch, shape.kv_heads, shape.key_tokens, shape.head_dim, layout); }

  // Gaps of the output keep the −7 that they start with, or the comparison fails.
  template <class Attention>
  std::vector<float> attend(Attention attention) const {
    std::vector<float> out(query_size(), -7.0f);
    attention(shape, scale, view_of(q.data(), shape.query_heads, shape.query_tokens, shape.head_dim, layout),
              view_of(k.data(), shape.kv_heads, shape.key_tokens, shape.head_dim, layout),
              view_of(v.data(), shape.kv_heads, shape.key_tokens, shape.head_dim, layout),
              view_of(out.data(), shape.query_heads, shape.query_tokens, shape.head_dim, layout));
    return out;
  }

  std::vector<float> actual() const { return attend(causal_attention); }
  std::vector<float> expected() const { return attend(reference::causal_attention); }
};

void expect_equals_reference(const AttentionShape& shape, Layout layout = Layout::kHeadMajor, double spread = 1.0) {
  SCOPED_TRACE(::testing::Message() << "B " << shape.batch << " Hq " << shape.query_heads << " Hkv " << shape.kv_heads << " T "
                                    << shape.query_tokens << " S " << shape.key_tokens << " D " << shape.head_dim);
  const Problem problem(shape, layout, spread);
  // Scores grow with the square of the spread, and their rounding moves weights by as much.
  testing::expect_near(problem.actual(), problem.expected(), 3e-6 * std::max(1.0, spread * spread));
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
  }
}

}  // namespace
}  // namespace veloxquant
