#include "veloxquant/kernels/silu_gate.h"

#include <cmath>

#include "veloxquant/core/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "veloxquant/kernels/silu_gate.cpp"
// clang-format off
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "hwy/contrib/math/math-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace veloxquant {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

void silu_gate_rows(const float* joined, float* out, std::size_t rows, std::size_t dim) {
  const hn::ScalableTag<float> d;
  const std::size_t lanes = hn::Lanes(d), whole = dim / lanes * lanes;
  const auto one = hn::Set(d, 1.0f);
  // Beyond 104 Highway's Exp returns anything; e^88 is near the end of float, and the quotient is as good as 0.
  const auto largest = hn::Set(d, 88.0f);
  for (std::size_t r = 0; r < rows; ++r, joined += 2 * dim, out += dim) {
    for (std::size_t i = 0; i < whole; i += lanes) {
      const auto gate = hn::LoadU(d, joined + i);
      const auto silu = hn::Div(gate, hn::Add(one, hn::Exp(d, hn::Min(hn::Neg(gate), largest))));
      hn::StoreU(hn::Mul(silu, hn::LoadU(d, joined + dim + i)), d, out + i);
    }
    for (std::size_t i = whole; i < dim; ++i) out[i] = joined[i] / (1.0f + std::exp(-joined[i])) * joined[dim + i];
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace veloxquant
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace veloxquant {

HWY_EXPORT(silu_gate_rows);

void silu_gate_joined(const float* joined, float* out, std::size_t rows, std::size_t dim) {
  constexpr std::size_t kBlockElements = 1 << 15;
  parallel_for(rows, kBlockElements / dim + 1, [&](std::size_t begin, std::size_t end) {
    HWY_DYNAMIC_DISPATCH(silu_gate_rows)(joined + begin * 2 * dim, out + begin * dim, end - begin, dim);
  });
}

}  // namespace veloxquant
#endif
