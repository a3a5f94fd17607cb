#include "veloxquant/kernels/gate.h"

#include <algorithm>
#include <cmath>

#include "veloxquant/core/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "veloxquant/kernels/gate.cpp"
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

// a(x) of an activation x·σ(a(x)), and its slope; beyond ±30 a gate is open or shut, and cubes would overflow.
struct Silu {
  template <class D, class V = hn::Vec<D>>
  static V argument(D, V x) {
    return x;
  }
  template <class D, class V = hn::Vec<D>>
  static V slope(D d, V) {
    return hn::Set(d, 1.0f);
  }
  static float argument(float x) { return x; }
  static float slope(float) { return 1.0f; }
};

struct Gelu {
  static constexpr float kScale = 1.5957691216057308f, kCube = 0.044715f, kMost = 30.0f;  // 2·√(2/π)

  template <class D, class V = hn::Vec<D>>
  static V argument(D d, V x) {
    const V bounded = hn::Clamp(x, hn::Set(d, -kMost), hn::Set(d, kMost));
    return hn::Mul(hn::Mul(hn::Set(d, kScale), bounded),
                   hn::MulAdd(hn::Set(d, kCube), hn::Mul(bounded, bounded), hn::Set(d, 1.0f)));
  }
  template <class D, class V = hn::Vec<D>>
  static V slope(D d, V x) {
    const V slope = hn::Mul(hn::Set(d, kScale), hn::MulAdd(hn::Set(d, 3 * kCube), hn::Mul(x, x), hn::Set(d, 1.0f)));
    return hn::IfThenElseZero(hn::Lt(hn::Abs(x), hn::Set(d, kMost)), slope);
  }
  static float argument(float x) {
    const float bounded = std::clamp(x, -kMost, kMost);
    return kScale * bounded * (1.0f + kCube * bounded * bounded);
  }
  static float slope(float x) { return std::abs(x) < kMost ? kScale * (1.0f + 3 * kCube * x * x) : 0.0f; }
};

template <class Kind>
void rows_of(const float* joined, float* out, std::size_t rows, std::size_t dim) {
  const hn::ScalableTag<float> d;
  const std::size_t lanes = hn::Lanes(d), whole = dim / lanes * lanes;
  for (std::size_t r = 0; r < rows; ++r, joined += 2 * dim, out += dim) {
    for (std::size_t i = 0; i < whole; i += lanes) {
      const auto gate = hn::LoadU(d, joined + i);
      hn::StoreU(hn::Mul(hn::Mul(gate, sigmoid(d, Kind::argument(d, gate))), hn::LoadU(d, joined + dim + i)), d, out + i);
    }
    for (std::size_t i = whole; i < dim; ++i) out[i] = joined[i] * sigmoid(Kind::argument(joined[i])) * joined[dim + i];
  }
}

template <class Kind>
void backward_rows_of(const float* joined, const float* grad_out, float* grad_joined, std::size_t rows, std::size_t dim) {
  const hn::ScalableTag<float> d;
  const std::size_t lanes = hn::Lanes(d), whole = dim / lanes * lanes;
  const auto one = hn::Set(d, 1.0f);
  for (std::size_t r = 0; r < rows; ++r, joined += 2 * dim, grad_out += dim, grad_joined += 2 * dim) {
    for (std::size_t i = 0; i < whole; i += lanes) {
      const auto gate = hn::LoadU(d, joined + i), s = sigmoid(d, Kind::argument(d, gate)),
                 gained = hn::Mul(hn::LoadU(d, grad_out + i), s);
      const auto slope = hn::MulAdd(hn::Mul(gate, Kind::slope(d, gate)), hn::Sub(one, s), one);
      hn::StoreU(hn::Mul(hn::Mul(gained, hn::LoadU(d, joined + dim + i)), slope), d, grad_joined + i);
      hn::StoreU(hn::Mul(gained, gate), d, grad_joined + dim + i);
    }
    for (std::size_t i = whole; i < dim; ++i) {
      const float gate = joined[i], s = sigmoid(Kind::argument(gate)), gained = grad_out[i] * s;
      grad_joined[i] = gained * joined[dim + i] * (1.0f + gate * Kind::slope(gate) * (1.0f - s));
      grad_joined[dim + i] = gained * gate;
    }
  }
}

void gate_rows(Activation activation, const float* joined, float* out, std::size_t rows, std::size_t dim) {
  (activation == Activation::kSilu ? rows_of<Silu> : rows_of<Gelu>)(joined, out, rows, dim);
}

void gate_backward_rows(Activation activation, const float* joined, const float* grad_out, float* grad_joined, std::size_t rows,
                        std::size_t dim) {
  (activation == Activation::kSilu ? backward_rows_of<Silu> : backward_rows_of<Gelu>)(joined, grad_out, grad_joined, rows, dim);
}

}  // namespace HWY_NAMESPACE
}  // namespace veloxquant
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace veloxquant {

HWY_EXPORT(gate_rows);
HWY_EXPORT(gate_backward_rows);

namespace {

constexpr std::size_t kBlockElements = 1 << 15;

}  // namespace

void gate_joined(Activation activation, const float* joined, float* out, std::size_t rows, std::size_t dim) {
  parallel_for(rows, kBlockElements / dim + 1, [&](std::size_t begin, std::size_t end) {
    HWY_DYNAMIC_DISPATCH(gate_rows)(activation, joined + begin * 2 * dim, out + begin * dim, end - begin, dim);
  });
}

void gate_joined_backward(Activation activation, const float* joined, const float* grad_out, float* grad_joined, std::size_t rows,
                          std::size_t dim) {
  parallel_for(rows, kBlockElements / dim + 1, [&](std::size_t begin, std::size_t end) {
    HWY_DYNAMIC_DISPATCH(gate_backward_rows)
    (activation, joined + begin * 2 * dim, grad_out + begin * dim, grad_joined + begin * 2 * dim, end - begin, dim);
  });
}

}  // namespace veloxquant
#endif
