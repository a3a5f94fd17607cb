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

// 1 / (1 + e^−x).
template <class D, class V = hn::Vec<D>>
V sigmoid(D d, V x) {
  // Beyond 104 Highway's Exp returns anything; e^88 is near the end of float, and the quotient is as good as 0.
  const V largest = hn::Set(d, 88.0f), one = hn::Set(d, 1.0f);
  return hn::Div(one, hn::Add(one, hn::Exp(d, hn::Min(hn::Neg(x), largest))));
}

float sigmoid(float x) {
  return 1.0f / (1.0f + std::exp(-x));
}

void silu_gate_rows(const float* joined, float* out, std::size_t rows, std::size_t dim) {
  const hn::ScalableTag<float> d;
  const std::size_t lanes = hn::Lanes(d), whole = dim / lanes * lanes;
  for (std::size_t r = 0; r < rows; ++r, joined += 2 * dim, out += dim) {
    for (std::size_t i = 0; i < whole; i += lanes) {
      const auto gate = hn::LoadU(d, joined + i);
      hn::StoreU(hn::Mul(hn::Mul(gate, sigmoid(d, gate)), hn::LoadU(d, joined + dim + i)), d, out + i);
    }
    for (std::size_t i = whole; i < dim; ++i) out[i] = joined[i] * sigmoid(joined[i]) * joined[dim + i];
  }
}

void silu_gate_backward_rows(const float* joined, const float* grad_out, float* grad_joined, std::size_t rows, std::size_t dim) {
  const hn::ScalableTag<float> d;
  const std::size_t lanes = hn::Lanes(d), whole = dim / lanes * lanes;
  const auto one = hn::Set(d, 1.0f);
  for (std::size_t r = 0; r < rows; ++r, joined += 2 * dim, grad_out += dim, grad_joined += 2 * dim) {
    for (std::size_t i = 0; i < whole; i += lanes) {
      const auto gate = hn::LoadU(d, joined + i), s = sigmoid(d, gate), gained = hn::Mul(hn::LoadU(d, grad_out + i), s);
      const auto slope = hn::MulAdd(gate, hn::Sub(one, s), one);
      hn::StoreU(hn::Mul(hn::Mul(gained, hn::LoadU(d, joined + dim + i)), slope), d, grad_joined + i);
      hn::StoreU(hn::Mul(gained, gate), d, grad_joined + dim + i);
    }
    for (std::size_t i = whole; i < dim; ++i) {
      const float gate = joined[i], s = sigmoid(gate), gained = grad_out[i] * s;
      grad_joined[i] = gained * joined[dim + i] * (1.0f + gate * (1.0f - s));
      grad_joined[dim + i] = gained * gate;
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace veloxquant
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace veloxquant {

HWY_EXPORT(silu_gate_rows);
HWY_EXPORT(silu_gate_backward_rows);

namespace {

constexpr std::size_t kBlockElements = 1 << 15;

}  // namespace

void silu_gate_joined(const float* joined, float* out, std::size_t rows, std::size_t dim) {
  parallel_for(rows, kBlockElements / dim + 1, [&](std::size_t begin, std::size_t end) {
    HWY_DYNAMIC_DISPATCH(silu_gate_rows)(joined + begin * 2 * dim, out + begin * dim, end - begin, dim);
  });
}

void silu_gate_joined_backward(const float* joined, const float* grad_out, float* grad_joined, std::size_t rows, std::size_t dim) {
  parallel_for(rows, kBlockElements / dim + 1, [&](std::size_t begin, std::size_t end) {
    HWY_DYNAMIC_DISPATCH(silu_gate_backward_rows)
    (joined + begin * 2 * dim, grad_out + begin * dim, grad_joined + begin * 2 * dim, end - begin, dim);
  });
}

}  // namespace veloxquant
#endif
