#include "veloxquant/kernels/rms_norm.h"

#include <cmath>

#include "veloxquant/core/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "veloxquant/kernels/rms_norm.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace veloxquant {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

void rms_norm_rows(const float* x, const float* weight, float* out, std::size_t rows, std::size_t dim, float eps) {
  const hn::ScalableTag<float> d;
  const std::size_t lanes = hn::Lanes(d), whole = dim / lanes * lanes;
  for (std::size_t r = 0; r < rows; ++r, x += dim, out += dim) {
    auto sum = hn::Zero(d);
    for (std::size_t i = 0; i < whole; i += lanes) {
      const auto v = hn::LoadU(d, x + i);
      sum = hn::MulAdd(v, v, sum);
    }
    float squares = hn::GetLane(hn::SumOfLanes(d, sum));
    for (std::size_t i = whole; i < dim; ++i) squares += x[i] * x[i];
    const float scale = 1.0f / std::sqrt(squares / static_cast<float>(dim) + eps);
    const auto vscale = hn::Set(d, scale);
    for (std::size_t i = 0; i < whole; i += lanes)
      hn::StoreU(hn::Mul(hn::Mul(hn::LoadU(d, x + i), vscale), hn::LoadU(d, weight + i)), d, out + i);
    for (std::size_t i = whole; i < dim; ++i) out[i] = x[i] * scale * weight[i];
  }
}

void rms_norm_backward_rows(const float* x, const float* weight, const float* grad_out, float* grad_x, std::size_t rows,
                            std::size_t dim, float eps) {
  const hn::ScalableTag<float> d;
  const std::size_t lanes = hn::Lanes(d), whole = dim / lanes * lanes;
  for (std::size_t r = 0; r < rows; ++r, x += dim, grad_out += dim, grad_x += dim) {
    auto sum = hn::Zero(d), product_sum = hn::Zero(d);
    for (std::size_t i = 0; i < whole; i += lanes) {
      const auto v = hn::LoadU(d, x + i);
      sum = hn::MulAdd(v, v, sum);
      product_sum = hn::MulAdd(v, hn::Mul(hn::LoadU(d, grad_out + i), hn::LoadU(d, weight + i)), product_sum);
    }
    float squares = hn::GetLane(hn::SumOfLanes(d, sum)), products = hn::GetLane(hn::SumOfLanes(d, product_sum));
    for (std::size_t i = whole; i < dim; ++i) {
      squares += x[i] * x[i];
      products += x[i] * (grad_out[i] * weight[i]);
    }
    const float scale = 1.0f / std::sqrt(squares / static_cast<float>(dim) + eps);
    const float shrink = scale * scale * scale * (products / static_cast<float>(dim));
    const auto vscale = hn::Set(d, scale), vshrink = hn::Set(d, shrink);
    for (std::size_t i = 0; i < whole; i += lanes) {
      const auto gained = hn::Mul(hn::Mul(hn::LoadU(d, grad_out + i), hn::LoadU(d, weight + i)), vscale);
      hn::StoreU(hn::NegMulAdd(vshrink, hn::LoadU(d, x + i), gained), d, grad_x + i);
    }
    for (std::size_t i = whole; i < dim; ++i) grad_x[i] = scale * grad_out[i] * weight[i] - shrink * x[i];
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace veloxquant
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace veloxquant {

HWY_EXPORT(rms_norm_rows);
HWY_EXPORT(rms_norm_backward_rows);

namespace {

constexpr std::size_t kBlockElements = 1 << 16;

}  // namespace

void rms_norm(const float* x, const float* weight, float* out, std::size_t rows, std::size_t dim, float eps) {
  parallel_for(rows, kBlockElements / dim + 1, [&](std::size_t begin, std::size_t end) {
    HWY_DYNAMIC_DISPATCH(rms_norm_rows)(x + begin * dim, weight, out + begin * dim, end - begin, dim, eps);
  });
}

void rms_norm_backward(const float* x, const float* weight, const float* grad_out, float* grad_x, std::size_t rows, std::size_t dim,
                       float eps) {
  parallel_for(rows, kBlockElements / dim + 1, [&](std::size_t begin, std::size_t end) {
    HWY_DYNAMIC_DISPATCH(rms_norm_backward_rows)
    (x + begin * dim, weight, grad_out + begin * dim, grad_x + begin * dim, end - begin, dim, eps);
  });
}

}  // namespace veloxquant
#endif
