#include "veloxquant/kernels/rope.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "veloxquant/core/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "veloxquant/kernels/rope.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace veloxquant {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

void rope_vector(const float* x, const float* cosines, const float* sines, float* out, std::size_t half) {
  const hn::ScalableTag<float> d;
  const std::size_t lanes = hn::Lanes(d), whole = half / lanes * lanes;
  for (std::size_t i = 0; i < whole; i += lanes) {
    const auto first = hn::LoadU(d, x + i), second = hn::LoadU(d, x + half + i);
    const auto c = hn::LoadU(d, cosines + i), s = hn::LoadU(d, sines + i);
    hn::StoreU(hn::NegMulAdd(second, s, hn::Mul(first, c)), d, out + i);
    hn::StoreU(hn::MulAdd(first, s, hn::Mul(second, c)), d, out + half + i);
  }
  for (std::size_t i = whole; i < half; ++i) {
    const float first = x[i], second = x[half + i];
    out[i] = first * cosines[i] - second * sines[i];
    out[half + i] = first * sines[i] + second * cosines[i];
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace veloxquant
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace veloxquant {

HWY_EXPORT(rope_vector);

namespace {

constexpr std::size_t kBlockTokens = 32;

// Cosines and sines of position · frequency for each frequency.
struct Turn {
  std::vector<double> cosines, sines;

  Turn(std::span<const float> frequencies, double position) {
    for (const double frequency : frequencies) {
      cosines.push_back(std::cos(position * frequency));
      sines.push_back(std::sin(position * frequency));
    }
  }
};

// By 0, 1, … positions, at least `count`.  Those of the last frequencies are kept: trigonometry is slow, and layers turn alike.
std::span<const Turn> turns(std::span<const float> frequencies, std::size_t count) {
  thread_local std::vector<float> of;
  thread_local std::vector<Turn> kept;
  if (!std::equal(of.begin(), of.end(), frequencies.begin(), frequencies.end())) {
    of.assign(frequencies.begin(), frequencies.end());
    kept.clear();
  }
  while (kept.size() < count) kept.emplace_back(frequencies, static_cast<double>(kept.size()));
  return kept;
}

}  // namespace

void rope(const RopeShape& shape, StridedView x, std::span<const float> frequencies, float magnitude, std::ptrdiff_t offset,
          MutableStridedView out) {
  const std::size_t half = frequencies.size(), rest = shape.head_dim - 2 * half;
  // A position is turned from the begin of its block by one of these, by the addition theorems.
  const auto steps = turns(frequencies, std::min(kBlockTokens, shape.tokens));
  parallel_for(shape.tokens, kBlockTokens, [&](std::size_t begin, std::size_t end) {
    const Turn start(frequencies, static_cast<double>(offset + static_cast<std::ptrdiff_t>(begin)));
    std::vector<float> cosines(half), sines(half);
    for (std::size_t t = begin; t < end; ++t) {
      const Turn& step = steps[t - begin];
      for (std::size_t i = 0; i < half; ++i) {
        cosines[i] = static_cast<float>(magnitude * (start.cosines[i] * step.cosines[i] - start.sines[i] * step.sines[i]));
        sines[i] = static_cast<float>(magnitude * (start.sines[i] * step.cosines[i] + start.cosines[i] * step.sines[i]));
      }
      for (std::size_t b = 0; b < shape.batch; ++b) {
        for (std::size_t h = 0; h < shape.heads; ++h) {
          const float* from = x.at(b, h, t);
          float* to = out.at(b, h, t);
          HWY_DYNAMIC_DISPATCH(rope_vector)(from, cosines.data(), sines.data(), to, half);
          if (from != to) std::copy_n(from + 2 * half, rest, to + 2 * half);
        }
      }
    }
  });
}

}  // namespace veloxquant
#endif
