#include "veloxquant/cache/attention_tables.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "tests/cache/packed_inputs.h"
#include "veloxquant/quantize/half.h"

namespace veloxquant {
namespace {

using namespace testing;

struct Case {
  int dim, codes;
};

RotatedPqQuantizer quantizer_of(const Case& c, Side side) {
  // Far from zero, as keys with a bias are.
  const auto x = mx::add(random_array({700, c.dim}, 3), mx::multiply(random_array({c.dim}, 4), mx::array(8.0f)));
  mx::eval(x);
  const RotatedPqFitter fitter({x.data<float>(), x.size()}, c.dim, {}, side == Side::kKeys ? Rotation::kPlane : Rotation::kFull);
  return RotatedPqQuantizer(fitter.fit(side, {.codes = c.codes, .stages = 2, .patches = 3, .max_iter = 2}));
}

// What units make of a token's codes, as kernels/cuda/packed_attention.cuh reads them; rests: those of a patch, rotated.
std::vector<double> key_of(const KeyTables& tables, const std::vector<std::uint8_t>& codes, const std::vector<float>& rests,
                           std::size_t rest_columns, int dim) {
  std::vector<double> key(static_cast<std::size_t>(dim), 1e9);
  const std::size_t units = tables.units.size();
  for (std::size_t u = 0; u < units; ++u) {
    const KeyUnit& unit = tables.units[u];
    for (std::size_t i = 0; i < 8; ++i) {
      if (unit.columns[i] < 0) continue;
      const auto entry = [&](std::size_t stage) {
        return tables.tables[((codes[static_cast<std::size_t>(unit.codes[stage])] * std::size_t{2} + stage) * units + u) * 8 + i];
      };
      const int sum = entry(0) + entry(1);
      EXPECT_LE(sum, 255);
      const std::uint16_t half = unit.offsets[i / 4 * 4 + i % 2 * 2 + i / 2 % 2];
      const std::uint8_t bytes[2] = {static_cast<std::uint8_t>(half), static_cast<std::uint8_t>(half >> 8)};
      double value = sum - (load_half(bytes) - 1024.0);
      for (std::size_t j = 0; j < static_cast<std::size_t>(unit.rest_count); ++j)
        value += rests[static_cast<std::size_t>(unit.rest_begin) + j] * tables.rests[(u * 8 + i) * rest_columns + j];
      key[static_cast<std::size_t>(unit.columns[i])] = static_cast<double>(unit.scale) * value;
    }
  }
  return key;
}

std::vector<std::uint8_t> some_codes(int count, std::uint64_t seed) {
  std::vector<std::uint8_t> codes;
  for (int i = 0; i < count; ++i) codes.push_back(static_cast<std::uint8_t>((static_cast<unsigned>(i) * 77 + seed * 131) % 256));
  return codes;
}

class Tables : public ::testing::TestWithParam<Case> {};

TEST_P(Tables, KeysAreThoseOfTheQuantizer) {
  const auto [dim, codes] = GetParam();
  const auto quantizer = quantizer_of({dim, codes}, Side::kKeys);
  const Rope rope(RopeConfig{}, dim);
  const std::size_t columns = rest_columns(quantizer, rope), units = (num_units(quantizer) + 7) / 8 * 8;
  ASSERT_GT(columns, 0u);
  const auto tables = key_tables(quantizer, rope, units, columns);
  ASSERT_EQ(tables.units.size(), units);
  float largest = 0;
  for (const auto& unit : tables.units) largest = std::max(largest, unit.scale);
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    const auto token = some_codes(codes, seed);
    std::vector<float> rest(static_cast<std::size_t>(dim));
    for (std::size_t i = 0; i < rest.size(); ++i) rest[i] = 0.1f * static_cast<float>((i * 7 + seed) % 11) - 0.5f;
    // The quantizer's own: A⁻¹ of its entries and the rest, and μ.
    std::vector<double> z(rest.begin(), rest.end()), expected(quantizer.mean().begin(), quantizer.mean().end());
    std::size_t column = 0, code = 0;
    for (const auto& subspace : quantizer.subspaces()) {
      for (int stage = 0; stage < subspace.stages(); ++stage, ++code)
        for (int i = 0; i < subspace.dim(); ++i) z[column + static_cast<std::size_t>(i)] += subspace.entry(stage, token[code])[i];
      column += static_cast<std::size_t>(subspace.dim());
    }
    for (std::size_t i = 0; i < z.size(); ++i)
      for (std::size_t j = 0; j < z.size(); ++j) expected[j] += z[i] * quantizer.inverse()[i * z.size() + j];
    const auto got = key_of(tables, token, rest, columns, dim);
    for (std::size_t i = 0; i < z.size(); ++i) EXPECT_NEAR(got[i], expected[i], 0.02 * largest) << "dimension " << i;
  }
}

TEST_P(Tables, ValuesAreThoseOfTheQuantizer) {
  const auto [dim, codes] = GetParam();
  const auto quantizer = quantizer_of({dim, codes}, Side::kValues);
  const std::size_t units = (num_units(quantizer) + 7) / 8 * 8;
  const auto tables = value_tables(quantizer, units);
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    const auto token = some_codes(codes, seed);
    std::vector<double> expected(static_cast<std::size_t>(dim)), got(expected);
    std::size_t column = 0, code = 0;
    for (const auto& subspace : quantizer.subspaces()) {
      for (int stage = 0; stage < subspace.stages(); ++stage, ++code)
        for (int i = 0; i < subspace.dim(); ++i)
          expected[column + static_cast<std::size_t>(i)] += subspace.entry(stage, token[code])[i];
      column += static_cast<std::size_t>(subspace.dim());
    }
    float largest = 0;
    for (std::size_t u = 0; u < units; ++u) {
      const ValueUnit& unit = tables.units[u];
      largest = std::max(largest, unit.scale);
      for (std::size_t i = 0; i < static_cast<std::size_t>(unit.width); ++i) {
        const auto entry = [&](std::size_t stage) {
          return tables.tables[((token[static_cast<std::size_t>(unit.codes[stage])] * std::size_t{2} + stage) * units + u) * 8 + i];
        };
        EXPECT_LE(entry(0) + entry(1), 255);
        got[static_cast<std::size_t>(unit.column) + i] = static_cast<double>(unit.scale) * (entry(0) + entry(1)) + unit.low[i];
      }
    }
    for (std::size_t i = 0; i < expected.size(); ++i) EXPECT_NEAR(got[i], expected[i], 0.02 * largest) << "column " << i;
  }
}

// As lanes of the product take them (kernels/cuda/packed_full_keys.cuh).
TEST_P(Tables, RotatedKeysTimesTheInverseAreThoseOfTheQuantizer) {
  const auto [dim, codes] = GetParam();
  if (dim % 16 != 0) GTEST_SKIP() << "no kernel";
  const auto x = random_array({700, dim}, 3);
  const RotatedPqFitter fitter({x.data<float>(), x.size()}, dim, {}, Rotation::kFull);
  const RotatedPqQuantizer quantizer(fitter.fit(Side::kKeys, {.codes = codes, .stages = 2, .max_iter = 2}));
  RopeConfig config;
  config.dims = dim / 2;  // partial: the others are planes that do not turn
  const auto places = key_places(dim, Rope(config, dim));
  std::vector<int> sorted = places.columns;
  std::ranges::sort(sorted);
  for (int i = 0; i < dim; ++i) EXPECT_EQ(sorted[static_cast<std::size_t>(i)], i);
  EXPECT_EQ(places.turns[static_cast<std::size_t>(dim / 2 - 1)], 0u);

  const std::size_t units = (num_units(quantizer) + 7) / 8 * 8;
  const auto tables = rotated_key_tables(quantizer, units);
  const auto fragments = inverse_fragments(quantizer, tables.units, places);
  ASSERT_EQ(fragments.size(), static_cast<std::size_t>(dim) / 8 * units / 2 * 32 * 4);
  const auto token = some_codes(codes, 1);
  // A key's bytes less their offsets, times the words of every lane.
  std::vector<double> got(static_cast<std::size_t>(dim));
  for (std::size_t product = 0; product < static_cast<std::size_t>(dim) / 8; ++product)
    for (std::size_t half_unit = 0; half_unit < units / 2; ++half_unit)
      for (std::size_t lane = 0; lane < 32; ++lane) {
        const std::size_t u = half_unit / 2 * 4 + lane % 4;
        const KeyUnit& unit = tables.units[u];
        for (std::size_t word = 0; word < 4; ++word) {
          const std::size_t i = half_unit % 2 * 4 + std::vector<std::size_t>{0, 2, 1, 3}[word];
          const auto half_of = [](std::uint16_t half) {
            const std::uint8_t bytes[2] = {static_cast<std::uint8_t>(half), static_cast<std::uint8_t>(half >> 8)};
            return static_cast<double>(load_half(bytes));
          };
          double sum = 0;
          for (std::size_t stage = 0; stage < 2; ++stage)
            sum +=
                tables.tables[((token[static_cast<std::size_t>(unit.codes[stage])] * std::size_t{2} + stage) * units + u) * 8 + i];
          const std::uint16_t offset = unit.offsets[i / 4 * 4 + i % 2 * 2 + i / 2 % 2];
          const double z = i < static_cast<std::size_t>(unit.rest_count) ? sum - (half_of(offset) - 1024) : 0;
          got[static_cast<std::size_t>(places.columns[8 * product + lane / 4])] +=
              z * half_of(fragments[((product * (units / 2) + half_unit) * 32 + lane) * 4 + word]);
        }
      }
  std::vector<double> z(static_cast<std::size_t>(dim)), expected(z);
  std::size_t column = 0, code = 0;
  for (const auto& subspace : quantizer.subspaces()) {
    for (int stage = 0; stage < subspace.stages(); ++stage, ++code)
      for (int i = 0; i < subspace.dim(); ++i) z[column + static_cast<std::size_t>(i)] += subspace.entry(stage, token[code])[i];
    column += static_cast<std::size_t>(subspace.dim());
  }
  double square = 0, error = 0;
  for (std::size_t j = 0; j < z.size(); ++j) {
    for (std::size_t i = 0; i < z.size(); ++i) expected[j] += z[i] * quantizer.inverse()[i * z.size() + j];
    square += expected[j] * expected[j], error += (expected[j] - got[j]) * (expected[j] - got[j]);
  }
  EXPECT_LT(std::sqrt(error), 2e-3 * std::sqrt(square));  // A⁻¹ in half precision
}

INSTANTIATE_TEST_SUITE_P(AttentionTables, Tables,
                         ::testing::Values(Case{64, 16}, Case{64, 9}, Case{128, 21}, Case{128, 32}, Case{80, 7}, Case{128, 64}),
                         [](const auto& info) {
                           return std::to_string(info.param.dim) + "dims" + std::to_string(info.param.codes) + "codes";
                         });

TEST(AttentionTables, KeysThatAreNotPlanesHaveNone) {
  const auto x = random_array({400, 64}, 3);
  const RotatedPqFitter fitter({x.data<float>(), x.size()}, 64, {}, Rotation::kFull);
  const RotatedPqQuantizer quantizer(fitter.fit(Side::kKeys, {.codes = 8, .stages = 2, .max_iter = 2}));
  EXPECT_EQ(rest_columns(quantizer, Rope(RopeConfig{}, 64)), 0u);
}

// Layers without RoPE: planes that do not turn.
TEST(AttentionTables, PlanesNeedNotTurn) {
  const auto quantizer = quantizer_of({64, 9}, Side::kKeys);
  RopeConfig config;
  config.dims = 0;
  const Rope none(config, 64);
  const std::size_t columns = rest_columns(quantizer, none);
  ASSERT_GT(columns, 0u);
  for (const auto& unit : key_tables(quantizer, none, num_units(quantizer), columns).units)
    for (const unsigned turns : unit.turns) EXPECT_EQ(turns, 0u);
  config.dims = 32;
  EXPECT_EQ(rest_columns(quantizer, Rope(config, 64)), 0u);
}

TEST(AttentionTables, TurnsAreFractionsOfACircle) {
  EXPECT_EQ(turns_of(0.0f), 0u);
  EXPECT_NEAR(turns_of(1.0f), 0x1p32 / (2 * M_PI), 300);  // a float has 24 bits
}

}  // namespace
}  // namespace veloxquant
