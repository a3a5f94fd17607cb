#include "veloxquant/quantize/affine.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>

#include "tests/quantize/samples.h"
#include "veloxquant/kernels/bit_packing.h"
#include "veloxquant/quantize/half.h"

namespace veloxquant {
namespace {

// What MLX 0.32.4's mx.quantize gives for two groups of 64, the second the negative of the first.  Scale and bias are halves, so
// that storing them loses nothing.
struct Golden {
  int bits;
  float scale, bias;
  std::string codes;
};

const Golden kGolden[] = {
    {2, 0.25f, -0.5f, "0213102032121021320213212102132021021310313212102132021321310213"},
    {3, 0.25f, -1.0f, "0426305072163052641537416305264153042631727416305264153742631527"},
    {4, 0.25f, -2.0f, "094d70b0e23e60a4d82b5f93c71a5e82c6094d72f5e93c61a4d82b6f93d71a5e"},
    {5, 0.25f, -4.0f, "0j7qf0m0t26ud1k8rg4nbui7qe2l9th5oc0j8rf3vaui6pd1l9sg4ncvj7qe3mat"},
};

// i-th of well spread numbers of `bits` bits.
std::uint32_t spread(std::uint32_t i, int bits) {
  return i * 2654435761u >> (32 - bits);
}

std::vector<float> golden_input(int bits) {
  const auto levels = static_cast<float>((1 << bits) - 1), low = -0.25f * static_cast<float>(1 << (bits - 1));
  std::vector<float> x(128);
  for (std::uint32_t i = 0; i < 64; ++i) x[i] = low + static_cast<float>(spread(i, 8)) * (levels * 0.25f / 256);
  x[5] = low;
  x[40] = low + levels * 0.25f;
  x[7] = low + 0.125f;  // half-way between two levels, as the next two
  x[9] = low + 0.375f;
  x[11] = low + 0.25f * (levels - 0.5f);
  for (std::size_t i = 0; i < 64; ++i) x[64 + i] = -x[i];
  return x;
}

TEST(Affine, CodesOfMlx) {
  for (const auto& golden : kGolden) {
    SCOPED_TRACE(golden.bits);
    const AffineQuantizer quantizer(128, golden.bits, 64);
    const auto bytes = testing::encoded(quantizer, golden_input(golden.bits));
    EXPECT_EQ(load_half(bytes.data()), golden.scale);
    EXPECT_EQ(load_half(bytes.data() + 2), golden.bias);
    EXPECT_EQ(load_half(bytes.data() + 4), -golden.scale);
    EXPECT_EQ(load_half(bytes.data() + 6), -golden.bias);
    std::vector<std::uint16_t> codes(128);
    unpack_bits(bytes.data() + 8, golden.bits, codes);
    std::string text;
    for (const auto code : codes) text += "0123456789abcdefghijklmnopqrstuv"[code];
    EXPECT_EQ(text, golden.codes + golden.codes);
  }
}

// The same groups of arbitrary values for mx.quantize: scales and biases in float32.
TEST(Affine, ScalesOfMlx) {
  const struct {
    int bits;
    float scales[2];
  } golden[] = {{2, {-0x1.7bd64ap-2f, -0x1.77ac94p-2f}}, {3, {-0x1.2fdea2p-3f, -0x1.2c8a10p-3f}},
                {4, {-0x1.143ec2p-4f, -0x1.1137b2p-4f}}, {5, {-0x1.083c06p-5f, -0x1.0556aap-5f}},
                {6, {-0x1.029ccap-6f, -0x1.ff8e68p-7f}}, {8, {-0x1.fd19dap-9f, -0x1.f78578p-9f}}};
  const float biases[2] = {0x1.7bd64ap-1f, 0x1.77ac94p-1f};
  std::vector<float> x(128);
  for (std::uint32_t i = 0; i < 128; ++i) x[i] = static_cast<float>(spread(i, 24)) * 0x1p-24f - 0.25f;
  for (const auto& row : golden) {
    SCOPED_TRACE(row.bits);
    const auto bytes = testing::encoded(AffineQuantizer(128, row.bits, 64), x);
    for (int group = 0; group < 2; ++group) {
      EXPECT_EQ(load_half(bytes.data() + group * 4), round_to_half(row.scales[group]));
      EXPECT_EQ(load_half(bytes.data() + group * 4 + 2), round_to_half(biases[group]));
    }
  }
}

TEST(Affine, ErrorIsAtMostHalfAStep) {
  for (const int dim : {64, 128, 80, 1, 65}) {
    for (int bits = 1; bits <= 8; ++bits) {
      SCOPED_TRACE(::testing::Message() << "dim " << dim << ", " << bits << " bits");
      const auto x = testing::keys(33, static_cast<std::size_t>(dim));
      const auto y = testing::restored(AffineQuantizer(dim, bits, 64), x);
      for (std::size_t begin = 0; begin < x.size();) {
        const std::size_t size = std::min<std::size_t>(64, static_cast<std::size_t>(dim) - begin % static_cast<std::size_t>(dim));
        const auto [low, high] = std::minmax_element(x.begin() + static_cast<std::ptrdiff_t>(begin),
                                                     x.begin() + static_cast<std::ptrdiff_t>(begin + size));
        const float largest = std::max(std::abs(*low), std::abs(*high));
        // Moving zero onto a level stretches or shifts the levels by up to half a step at the end that is not exact.
        const float step = (*high - *low) / static_cast<float>((1 << bits) - 1);
        for (std::size_t i = begin; i < begin + size; ++i)
          ASSERT_NEAR(y[i], x[i], (bits == 1 ? 1.5f : 1.01f) * step + largest * 0x1p-9f + 1e-7f) << i;
        begin += size;
      }
    }
  }
}

TEST(Affine, ZeroIsExactWhereItLiesInside) {
  auto x = testing::gaussian(1, 64);
  x[17] = 0;
  for (int bits = 2; bits <= 8; ++bits) EXPECT_NEAR(testing::restored(AffineQuantizer(64, bits, 64), x)[17], 0, 2e-3) << bits;
}

}  // namespace
}  // namespace veloxquant
