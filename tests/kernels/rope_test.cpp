#include "veloxquant/kernels/rope.h"

#include <cmath>

#include "tests/kernels/every_target.h"

namespace veloxquant {
namespace {

using testing::normal_values;

std::vector<float> frequencies_of(std::size_t head_dim) {
  std::vector<float> frequencies(head_dim / 2);
  for (std::size_t i = 0; i < frequencies.size(); ++i)
    frequencies[i] = static_cast<float>(std::pow(10000.0, -2.0 * static_cast<double>(i) / static_cast<double>(head_dim)));
  return frequencies;
}

template <class T>
Strided<T> contiguous(const RopeShape& shape, T* data) {
  const auto token = static_cast<std::ptrdiff_t>(shape.head_dim), head = token * static_cast<std::ptrdiff_t>(shape.tokens);
  return {data, head * static_cast<std::ptrdiff_t>(shape.heads), head, token};
}

// Heads beside each other within a token, as they leave a joined product of queries, keys and values, with a gap after each token.
template <class T>
Strided<T> token_major(const RopeShape& shape, T* data) {
  const auto head = static_cast<std::ptrdiff_t>(shape.head_dim), token = head * static_cast<std::ptrdiff_t>(shape.heads) + 3;
  return {data, token * static_cast<std::ptrdiff_t>(shape.tokens), head, token};
}

std::size_t token_major_size(const RopeShape& shape) {
  return shape.batch * shape.tokens * (shape.heads * shape.head_dim + 3);
}

std::vector<float> turned(const RopeShape& shape, const std::vector<float>& x, std::ptrdiff_t offset) {
  std::vector<float> out(x.size());
  rope(shape, contiguous(shape, x.data()), frequencies_of(shape.head_dim), 1.0f, offset, contiguous(shape, out.data()));
  return out;
}

TEST(Rope, EqualsReference) {
  testing::for_each_target([] {
    for (const std::size_t dim : {2, 4, 6, 32, 64, 80, 128, 256}) {
      for (const std::size_t tokens : {1, 2, 33, 65}) {
        for (const std::ptrdiff_t offset : {0, 1, 5000}) {
          SCOPED_TRACE(dim);
          const RopeShape shape{2, 3, tokens, dim};
          const auto x = normal_values(2 * 3 * tokens * dim, dim);
          std::vector<float> expected(x.size());
          reference::rope(shape, contiguous(shape, x.data()), frequencies_of(dim), 1.0f, offset,
                          contiguous(shape, expected.data()));
          testing::expect_near(turned(shape, x, offset), expected, 1e-6);
        }
      }
    }
  });
}

TEST(Rope, StridesOfInputAndOutput) {
  const RopeShape shape{2, 3, 37, 20};
  const auto x = normal_values(token_major_size(shape), 1);
  std::vector<float> packed(2 * 3 * 37 * 20), from_strided(packed.size()), to_strided(x.size(), -7.0f);
  const auto view = token_major(shape, x.data());
  for (std::size_t b = 0; b < 2; ++b)
    for (std::size_t h = 0; h < 3; ++h)
      for (std::size_t t = 0; t < 37; ++t) std::copy_n(view.at(b, h, t), 20, contiguous(shape, packed.data()).at(b, h, t));
  const auto expected = turned(shape, packed, 11);

  rope(shape, view, frequencies_of(20), 1.0f, 11, contiguous(shape, from_strided.data()));
  EXPECT_EQ(from_strided, expected);

  rope(shape, contiguous(shape, static_cast<const float*>(packed.data())), frequencies_of(20), 1.0f, 11,
       token_major(shape, to_strided.data()));
  const auto written = token_major(shape, to_strided.data());
  for (std::size_t b = 0; b < 2; ++b)
    for (std::size_t t = 0; t < 37; ++t) {
      for (std::size_t h = 0; h < 3; ++h)
        EXPECT_TRUE(std::equal(written.at(b, h, t), written.at(b, h, t) + 20, contiguous(shape, expected.data()).at(b, h, t)));
      for (std::size_t i = 0; i < 3; ++i) EXPECT_EQ(written.at(b, 2, t)[20 + i], -7.0f) << "the gap was written to";
    }
}

TEST(Rope, InPlace) {
  const RopeShape shape{1, 2, 40, 66};
  auto x = normal_values(2 * 40 * 66, 4);
  const auto expected = turned(shape, x, 9);
  rope(shape, contiguous(shape, static_cast<const float*>(x.data())), frequencies_of(66), 1.0f, 9, contiguous(shape, x.data()));
  EXPECT_EQ(x, expected);
}

// Some dimensions, lengthened; what does not turn stays as it is.
TEST(Rope, PartOfAHead) {
  const RopeShape shape{2, 3, 40, 96};
  const auto x = normal_values(2 * 3 * 40 * 96, 5);
  testing::for_each_target([&] {
    for (const std::size_t dims : {0, 2, 24, 64, 96}) {
      const auto frequencies = frequencies_of(dims);
      std::vector<float> actual(x.size()), expected(x.size());
      rope(shape, contiguous(shape, x.data()), frequencies, 1.25f, 7, contiguous(shape, actual.data()));
      reference::rope(shape, contiguous(shape, x.data()), frequencies, 1.25f, 7, contiguous(shape, expected.data()));
      testing::expect_near(actual, expected, 2e-6);
      for (std::size_t row = 0; row < x.size(); row += 96)
        EXPECT_TRUE(std::equal(x.begin() + static_cast<std::ptrdiff_t>(row + dims),
                               x.begin() + static_cast<std::ptrdiff_t>(row + 96),
                               actual.begin() + static_cast<std::ptrdiff_t>(row + dims)));
    }
  });
}

// A turn keeps lengths, and q·k depends on the distance of positions alone: what attention needs of it.
TEST(Rope, InnerProductsDependOnDistance) {
  const RopeShape shape{1, 2, 1, 64};
  const auto x = normal_values(2 * 64, 8);
  const auto product = [&](std::ptrdiff_t query_position, std::ptrdiff_t key_position) {
    const auto q = turned(shape, x, query_position), k = turned(shape, x, key_position);
    double sum = 0;
    for (std::size_t i = 0; i < 64; ++i) sum += static_cast<double>(q[i]) * k[64 + i];
    return sum;
  };
  EXPECT_NEAR(product(17, 5), product(4012, 4000), 1e-4);
  EXPECT_GT(std::abs(product(17, 5) - product(17, 6)), 1e-2);
  EXPECT_EQ(turned(shape, x, 0), x);
}

TEST(Rope, SameBitsOnAnyThreads) {
  const RopeShape shape{2, 4, 131, 32};
  const auto x = normal_values(2 * 4 * 131 * 32, 6);
  testing::expect_same_on_any_threads([&] { return turned(shape, x, 3); });
}

}  // namespace
}  // namespace veloxquant
