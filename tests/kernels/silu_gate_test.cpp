#include "veloxquant/kernels/silu_gate.h"

#include <cmath>
#include <limits>

#include "tests/kernels/every_target.h"

namespace veloxquant {
namespace {

using testing::normal_values;

std::vector<float> gated(const std::vector<float>& joined, std::size_t dim) {
  std::vector<float> out(joined.size() / 2);
  silu_gate_joined(joined.data(), out.data(), out.size() / dim, dim);
  return out;
}

std::vector<float> expected(const std::vector<float>& joined, std::size_t dim) {
  std::vector<float> out(joined.size() / 2);
  reference::silu_gate_joined(joined.data(), out.data(), out.size() / dim, dim);
  return out;
}

TEST(SiluGate, EqualsReferenceAtOddSizes) {
  testing::for_each_target([] {
    for (const std::size_t dim : {1, 2, 3, 7, 63, 64, 65, 129, 1000}) {
      for (const std::size_t rows : {1, 2, 5}) {
        SCOPED_TRACE(dim);
        const auto joined = normal_values(rows * 2 * dim, dim, 4.0);
        testing::expect_near(gated(joined, dim), expected(joined, dim), 1e-7, 1e-6);
      }
    }
  });
}

// e^−gate leaves the range of float below −88, and that of Highway's Exp below −104.
TEST(SiluGate, ExtremeGates) {
  const std::vector<float> gates = {-1e30f, -1e4f,   -500, -289,   -200, -177, -150, -105, -103, -89, -88,  -87,  -30,
                                    -1,     -1e-30f, 0,    1e-30f, 1,    30,   88,   89,   104,  200, 1e4f, 1e30f};
  testing::for_each_target([&] {
    for (const std::size_t dim : {std::size_t{1}, gates.size()}) {  // one: the scalar tail
      std::vector<float> joined;
      for (std::size_t i = 0; i < gates.size(); i += dim) {
        joined.insert(joined.end(), gates.begin() + static_cast<std::ptrdiff_t>(i),
                      gates.begin() + static_cast<std::ptrdiff_t>(i + dim));
        joined.insert(joined.end(), dim, 1.0f);
      }
      const auto out = gated(joined, dim);
      for (std::size_t i = 0; i < gates.size(); ++i) {
        const double silu = gates[i] / (1 + std::exp(-static_cast<double>(gates[i])));
        EXPECT_NEAR(out[i], silu, 1e-7 + 1e-6 * std::abs(silu)) << "gate " << gates[i];
      }
    }
  });
}

TEST(SiluGate, SameBitsOnAnyThreads) {
  const auto joined = normal_values(400 * 2 * 257, 3);
  testing::expect_same_on_any_threads([&] { return gated(joined, 257); });
}

}  // namespace
}  // namespace veloxquant
