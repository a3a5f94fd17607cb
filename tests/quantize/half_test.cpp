#include "veloxquant/quantize/half.h"

#include <gtest/gtest.h>

#include <cmath>

namespace veloxquant {
namespace {

// Value of a half from the definition of the format.
double value_of(unsigned bits) {
  const int exponent = static_cast<int>(bits >> 10 & 31), mantissa = static_cast<int>(bits & 1023);
  const double magnitude = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
  return bits & 0x8000 ? -magnitude : magnitude;
}

std::uint8_t* bytes_of(unsigned bits, std::uint8_t* bytes) {
  bytes[0] = static_cast<std::uint8_t>(bits);
  bytes[1] = static_cast<std::uint8_t>(bits >> 8);
  return bytes;
}

TEST(Half, EveryFiniteValueThereAndBack) {
  std::uint8_t bytes[2];
  for (unsigned bits = 0; bits < 0x10000; ++bits) {
    if ((bits >> 10 & 31) == 31) continue;
    const float value = load_half(bytes_of(bits, bytes));
    ASSERT_EQ(value, value_of(bits));
    bytes[0] = bytes[1] = 0xff;
    store_half(value, bytes);
    ASSERT_EQ(bytes[0] | bytes[1] << 8, bits);
  }
}

TEST(Half, RoundsToTheNearestAndTiesToEven) {
  for (unsigned bits = 0; bits < 0x7bff; ++bits) {
    const double low = value_of(bits), high = value_of(bits + 1), middle = (low + high) / 2;
    const double even = bits % 2 == 0 ? low : high;
    ASSERT_EQ(round_to_half(static_cast<float>(middle)), even);
    ASSERT_EQ(round_to_half(std::nextafter(static_cast<float>(middle), 0.0f)), low);
    ASSERT_EQ(round_to_half(std::nextafter(static_cast<float>(middle), 1e9f)), high);
  }
}

TEST(Half, BeyondTheRangeIsTheLargestValue) {
  for (const float x : {65504.0f, 65519.0f, 65520.0f, 1e6f, 3e38f, INFINITY}) {
    EXPECT_EQ(round_to_half(x), 65504.0f);
    EXPECT_EQ(round_to_half(-x), -65504.0f);
    std::uint8_t bytes[2];
    store_half(-x, bytes);
    EXPECT_EQ(load_half(bytes), -65504.0f);
  }
}

}  // namespace
}  // namespace veloxquant
