#include "veloxquant/kernels/lut_scan.h"

#include <gtest/gtest.h>

#include "tests/kernels/every_target.h"

namespace veloxquant {
namespace {

using testing::for_each_target;
using testing::normal_values;

using Scan = void (*)(const ScanTables&, const ScanCodes&, float, float*);
using ReferenceScan = void (*)(const float*, std::size_t, const ScanCodes&, float, float*);

// Every number of tokens around a vector of any processor, and of codes around pairs.
void expect_reference(Scan scan, ReferenceScan reference, std::size_t centroids) {
  for (const std::size_t num_codes : {1, 2, 5, 16, 31}) {
    const auto products = normal_values(num_codes * centroids, num_codes);
    for (const std::size_t tokens : {1, 3, 15, 16, 17, 63, 64, 65, 130, 255, 256, 257, 600}) {
      SCOPED_TRACE(::testing::Message() << num_codes << " codes, " << tokens << " tokens");
      const std::size_t stride = (tokens + kScanGroup - 1) / kScanGroup * kScanGroup + 64;
      std::vector<std::uint8_t> bytes(num_codes * stride);
      Random random(tokens);
      for (auto& byte : bytes) byte = static_cast<std::uint8_t>(random.below(256));
      const ScanCodes codes{bytes.data(), tokens, stride};
      std::vector<float> expected(tokens);
      reference(products.data(), num_codes, codes, 0.3f, expected.data());
      const auto check = [&] {
        ScanTables tables;
        make_scan_tables(products.data(), num_codes, centroids, tables);
        std::vector<float> scores(tokens + 1, 7.0f);
        scan(tables, codes, 0.3f, scores.data());
        EXPECT_EQ(scores.back(), 7.0f);
        // Half a step for each code at most, and floats' own rounding.
        for (std::size_t t = 0; t < tokens; ++t)
          ASSERT_NEAR(scores[t], expected[t],
                      0.3 * static_cast<double>(num_codes) * (0.5 * tables.step * !tables.bytes.empty() + 1e-6))
              << t;
      };
      for_each_target(check);
      check();  // with AVX-512 VBMI, which other kernels are not compiled for
    }
  }
}

TEST(LutScan, EveryTokenHasAPlaceOfItsOwn) {
  std::vector<int> seen(2 * kScanGroup);
  for (std::size_t t = 0; t < seen.size(); ++t) ++seen.at(scan_place(t));
  for (const int count : seen) EXPECT_EQ(count, 1);
}

TEST(LutScan, AddsUpEntriesOfBytesAsTheReferenceDoes) {
  expect_reference(scan_bytes, reference::scan_bytes, 256);
}

TEST(LutScan, AddsUpEntriesOfNibblesAsTheReferenceDoes) {
  expect_reference(scan_nibbles, reference::scan_nibbles, 16);
}

// The largest sums that fit.
TEST(LutScan, HoldsTheLargestSums) {
  for (const std::size_t centroids : {16, 256}) {
    std::vector<float> products(kMaxScanCodes * centroids);
    for (std::size_t i = centroids - 1; i < products.size(); i += centroids) products[i] = 1.0f;  // the last of each code
    std::vector<std::uint8_t> bytes(kMaxScanCodes * 64, 255);
    const auto check = [&] {
      ScanTables tables;
      make_scan_tables(products.data(), kMaxScanCodes, centroids, tables);
      std::vector<float> scores(64);
      (centroids == 16 ? scan_nibbles : scan_bytes)(tables, {bytes.data(), 64, 64}, 1.0f, scores.data());
      for (const float score : scores) ASSERT_NEAR(score, 256.0f, 1e-3);
    };
    for_each_target(check);
    check();
  }
}

TEST(LutScan, KnowsTablesThatAreTheSameEverywhere) {
  for (const std::size_t centroids : {16, 256}) {
    const std::vector<float> products(3 * centroids, -2.0f);
    const std::vector<std::uint8_t> bytes(3 * 64, 3);
    ScanTables tables;
    make_scan_tables(products.data(), 3, centroids, tables);
    std::vector<float> scores(64);
    (centroids == 16 ? scan_nibbles : scan_bytes)(tables, {bytes.data(), 64, 64}, 1.0f, scores.data());
    for (const float score : scores) EXPECT_FLOAT_EQ(score, -6.0f);
  }
}

}  // namespace
}  // namespace veloxquant
