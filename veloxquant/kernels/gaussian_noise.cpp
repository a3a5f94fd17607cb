#include "veloxquant/kernels/gaussian_noise.h"

#include <algorithm>

#include "veloxquant/core/parallel.h"
#include "veloxquant/core/random.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "veloxquant/kernels/gaussian_noise.cpp"
// clang-format off
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "hwy/contrib/math/math-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace veloxquant {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

template <class D, class V = hn::Vec<D>>
V finalise(D du, V h) {
  h = hn::Xor(h, hn::ShiftRight<16>(h));
  h = hn::Mul(h, hn::Set(du, 0x85EBCA6Bu));
  h = hn::Xor(h, hn::ShiftRight<13>(h));
  h = hn::Mul(h, hn::Set(du, 0xC2B2AE35u));
  return hn::Xor(h, hn::ShiftRight<16>(h));
}

void add_noise(const float* x, std::size_t first, std::size_t count, float deviation, std::uint32_t salt1, std::uint32_t salt2,
               float* out) {
  const hn::ScalableTag<float> d;
  const hn::RebindToUnsigned<decltype(d)> du;
  const hn::RebindToSigned<decltype(d)> di;
  const std::size_t lanes = hn::Lanes(d);
  const auto vdeviation = hn::Set(d, deviation);
  auto place = hn::Mul(hn::Iota(du, static_cast<std::uint32_t>(first)), hn::Set(du, kNoiseStride));
  const auto step = hn::Set(du, static_cast<std::uint32_t>(lanes) * kNoiseStride);
  const auto noise = [&]() HWY_ATTR {
    const auto h1 = finalise(du, hn::Add(place, hn::Set(du, salt1))), h2 = finalise(du, hn::Add(place, hn::Set(du, salt2)));
    place = hn::Add(place, step);
    // 24 bits are exact in float.
    const auto uniform =
        hn::MulAdd(hn::ConvertTo(d, hn::BitCast(di, hn::ShiftRight<8>(h1))), hn::Set(d, 0x1p-24f), hn::Set(d, 0x1p-25f));
    const auto radius = hn::Sqrt(hn::Mul(hn::Set(d, -2.0f), hn::Log(d, uniform)));
    // Signed, an angle lies in [−π, π): the same turn.
    const auto angle = hn::Mul(hn::ConvertTo(d, hn::BitCast(di, h2)), hn::Set(d, 1.4629180792671596e-9f));
    return hn::Mul(hn::Mul(vdeviation, radius), hn::Cos(d, angle));
  };
  std::size_t i = 0;
  for (; i + lanes <= count; i += lanes) hn::StoreU(hn::Add(hn::LoadU(d, x + i), noise()), d, out + i);
  if (i == count) return;
  HWY_ALIGN float last[hn::MaxLanes(d)];
  hn::Store(noise(), d, last);
  for (std::size_t j = 0; i < count; ++i, ++j) out[i] = x[i] + last[j];
}

}  // namespace HWY_NAMESPACE
}  // namespace veloxquant
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace veloxquant {

HWY_EXPORT(add_noise);

std::uint32_t noise_salt(std::uint64_t seed, int number) {
  return static_cast<std::uint32_t>(Random(seed, static_cast<std::uint64_t>(number)).next());
}

void add_gaussian_noise(const float* x, std::size_t count, float deviation, std::uint64_t seed, float* out) {
  constexpr std::size_t kBlock = 1 << 15;
  parallel_for(count, kBlock, [&](std::size_t begin, std::size_t end) {
    HWY_DYNAMIC_DISPATCH(add_noise)
    (x + begin, begin, end - begin, deviation, noise_salt(seed, 1), noise_salt(seed, 2), out + begin);
  });
}

}  // namespace veloxquant
#endif
