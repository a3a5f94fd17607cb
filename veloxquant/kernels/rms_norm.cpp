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

}  // namespace HWY_NAMESPACE
}  // namespace veloxquant
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace veloxquant {

HWY_EXPORT(rms_norm_rows);

void rms_norm(const float* x, const float* weight, float* out, std::size_t rows, std::size_t dim, float eps) {
  constexpr std::size_t kBlockElements = 1 << 16;
  parallel_for(rows, kBlockElements / dim + 1, [&](std::size_t begin, std::size_t end) {
    HWY_DYNAMIC_DISPATCH(rms_norm_rows)(x + begin * dim, weight, out + begin * dim, end - begin, dim, eps);
  });
}

}  // namespace veloxquant
#endif
