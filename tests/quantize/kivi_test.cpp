#include "veloxquant/quantize/kivi.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "tests/quantize/samples.h"
#include "veloxquant/quantize/half.h"

namespace veloxquant {
namespace {

// The paper's formula on one group of values, in place.
void restore_group(std::vector<float*> group, int bits) {
  const auto less = [](const float* a, const float* b) { return *a < *b; };
  const float low = round_to_half(**std::min_element(group.begin(), group.end(), less)),
              high = **std::max_element(group.begin(), group.end(), less);
  const auto levels = static_cast<float>((1 << bits) - 1);
  const float step = round_to_half((high - low) / levels);
  for (float* value : group) {
    const float code = step == 0 ? 0.0f : std::clamp(std::nearbyint((*value - low) / step), 0.0f, levels);
    *value = code * step + low;
  }
}

std::vector<float> expected(std::vector<float> x, Side side, std::size_t dim, int bits) {
  const std::size_t tokens = x.size() / dim;
  const std::size_t high = side == Side::kKeys ? 32 : 1, wide = side == Side::kKeys ? 1 : 32;  // of a group
  for (std::size_t token = 0; token < tokens; token += high) {
    for (std::size_t channel = 0; channel < dim; channel += wide) {
      std::vector<float*> group;
      for (std::size_t t = token; t < std::min(token + high, tokens); ++t)
        for (std::size_t c = channel; c < std::min(channel + wide, dim); ++c) group.push_back(&x[t * dim + c]);
      restore_group(group, bits);
    }
  }
  return x;
}

TEST(Kivi, EqualsTheFormula) {
  for (const Side side : {Side::kKeys, Side::kValues}) {
    for (const std::size_t dim : {1, 31, 32, 80, 128}) {
      for (const std::size_t tokens : {0, 1, 31, 32, 33, 97}) {
        for (const int bits : {1, 2, 4, 8}) {
          SCOPED_TRACE(::testing::Message() << to_string(side) << ", dim " << dim << ", " << tokens << " tokens, " << bits
                                            << " bits");
          const auto x = testing::keys(tokens, dim);
          const KiviQuantizer quantizer(side, static_cast<int>(dim), bits);
          ASSERT_EQ(testing::restored(quantizer, x), expected(x, side, dim, bits));
        }
      }
    }
  }
}

// Keys share a range over tokens 0 … 31: a change there must not reach token 32, and must reach its own group.
TEST(Kivi, KeysOfDifferentGroupsAreApart) {
  const KiviQuantizer quantizer(Side::kKeys, 16, 2);
  EXPECT_EQ(quantizer.token_group(), 32);
  EXPECT_EQ(KiviQuantizer(Side::kValues, 16, 2).token_group(), 1);
  auto x = testing::gaussian(40, 16);
  const auto before = testing::restored(quantizer, x);
  x[31 * 16 + 4] = 100;
  const auto after = testing::restored(quantizer, x);
  EXPECT_NE(before[0 * 16 + 4], after[0 * 16 + 4]);
  EXPECT_TRUE(std::equal(before.begin() + 32 * 16, before.end(), after.begin() + 32 * 16));
  for (std::size_t i = 0; i < 31 * 16; ++i)
    if (i % 16 != 4) {
      EXPECT_EQ(before[i], after[i]);
    }
}

TEST(Kivi, RateIsWidthAndOne) {
  for (int bits = 1; bits <= 8; ++bits) {
    EXPECT_DOUBLE_EQ(KiviQuantizer(Side::kKeys, 128, bits).rate(), bits + 1);
    EXPECT_DOUBLE_EQ(KiviQuantizer(Side::kValues, 128, bits).rate(), bits + 1);
  }
}

}  // namespace
}  // namespace veloxquant
