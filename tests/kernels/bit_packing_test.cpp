#include "veloxquant/kernels/bit_packing.h"

#include <gtest/gtest.h>

#include <vector>

#include "veloxquant/core/random.h"

namespace veloxquant {
namespace {

std::vector<std::uint16_t> random_codes(std::size_t count, int bits) {
  Random random(count, static_cast<std::uint64_t>(bits));
  std::vector<std::uint16_t> codes(count);
  for (auto& code : codes) code = static_cast<std::uint16_t>(random.below(1u << bits));
  return codes;
}

TEST(BitPacking, EveryBitIsWhereTheHeaderSays) {
  for (int bits = 1; bits <= 16; ++bits) {
    for (const std::size_t count : {0, 1, 2, 3, 7, 8, 9, 31, 64, 67}) {
      SCOPED_TRACE(testing::Message() << bits << " bits, " << count << " codes");
      const auto codes = random_codes(count, bits);
      const std::size_t bytes = packed_bytes(count, bits);
      EXPECT_EQ(bytes, (count * static_cast<std::size_t>(bits) + 7) / 8);
      std::vector<std::uint8_t> packed(bytes + 1, 0xa5);
      pack_bits(codes, bits, packed.data());
      EXPECT_EQ(packed.back(), 0xa5) << "wrote beyond the row";
      for (std::size_t bit = 0; bit < bytes * 8; ++bit) {
        const std::size_t code = bit / static_cast<std::size_t>(bits), within = bit % static_cast<std::size_t>(bits);
        const int expected = code < count ? codes[code] >> within & 1 : 0;
        ASSERT_EQ(packed[bit / 8] >> (bit % 8) & 1, expected) << "bit " << bit;
      }
      packed.pop_back();  // so that a sanitizer sees a read beyond the row
      packed.shrink_to_fit();
      std::vector<std::uint16_t> unpacked(count);
      unpack_bits(packed.data(), bits, unpacked);
      EXPECT_EQ(unpacked, codes);
    }
  }
}

TEST(BitPacking, KnownBytes) {
  const std::vector<std::uint16_t> codes = {1, 2, 3, 4, 5};  // 001 010 011 100 101, lowest bits first
  std::uint8_t packed[2];
  pack_bits(codes, 3, packed);
  EXPECT_EQ(packed[0], 0b11010001);
  EXPECT_EQ(packed[1], 0b01011000);
}

}  // namespace
}  // namespace veloxquant
