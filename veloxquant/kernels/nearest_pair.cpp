#include "veloxquant/kernels/nearest_pair.h"

#include <algorithm>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "veloxquant/kernels/nearest_pair.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace veloxquant {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// The smallest of x [count].
float least_of(const float* x, std::size_t count) {
  const hn::ScalableTag<float> d;
  const std::size_t lanes = hn::Lanes(d), whole = count / (4 * lanes) * 4 * lanes;
  hn::Vec<decltype(d)> minima[4];
  for (auto& minimum : minima) minimum = hn::Set(d, std::numeric_limits<float>::infinity());
  for (std::size_t i = 0; i < whole; i += 4 * lanes)
    for (std::size_t k = 0; k < 4; ++k) minima[k] = hn::Min(minima[k], hn::LoadU(d, x + i + k * lanes));
  float least = hn::GetLane(hn::MinOfLanes(d, hn::Min(hn::Min(minima[0], minima[1]), hn::Min(minima[2], minima[3]))));
  for (std::size_t i = whole; i < count; ++i) least = std::min(least, x[i]);
  return least;
}

// The first place of a value in sum(d, i): vectors of what is searched, and scalar(i): single ones.
template <class Sum, class Scalar>
std::size_t place_of(float value, std::size_t count, Sum sum, Scalar scalar) {
  const hn::ScalableTag<float> d;
  const std::size_t lanes = hn::Lanes(d), whole = count / lanes * lanes;
  const auto sought = hn::Set(d, value);
  for (std::size_t i = 0; i < whole; i += lanes) {
    const std::intptr_t found = hn::FindFirstTrue(d, hn::Eq(sum(d, i), sought));
    if (found >= 0) return i + static_cast<std::size_t>(found);
  }
  for (std::size_t i = whole; i < count; ++i)
    if (scalar(i) == value) return i;
  return 0;  // only for values that are not numbers
}

// Rows of sums that are searched together: their additions hide each other's latency.
constexpr std::size_t kRows = 8;

// least[r] = the smallest of second[j] + rows[r][j] over j < count.
void least_sums(const float* second, const float* const (&rows)[kRows], std::size_t count, float (&least)[kRows]) {
  const hn::ScalableTag<float> d;
  const std::size_t lanes = hn::Lanes(d), whole = count / lanes * lanes;
  hn::Vec<decltype(d)> minima[kRows];
  for (auto& minimum : minima) minimum = hn::Set(d, std::numeric_limits<float>::infinity());
  for (std::size_t j = 0; j < whole; j += lanes) {
    const auto some = hn::LoadU(d, second + j);
    for (std::size_t r = 0; r < kRows; ++r) minima[r] = hn::Min(minima[r], hn::Add(some, hn::LoadU(d, rows[r] + j)));
  }
  for (std::size_t r = 0; r < kRows; ++r) {
    least[r] = hn::GetLane(hn::MinOfLanes(d, minima[r]));
    for (std::size_t j = whole; j < count; ++j) least[r] = std::min(least[r], second[j] + rows[r][j]);
  }
}

CodePair nearest_pair(float* first, const float* second, const float* cross, std::size_t count, std::size_t beam) {
  std::size_t best = 0;
  float least = std::numeric_limits<float>::infinity(), rest = least;
  for (std::size_t k = 0; k < beam; k += kRows) {
    const std::size_t some = std::min(kRows, beam - k);
    std::size_t places[kRows];
    float starts[kRows], sums[kRows];
    const float* rows[kRows];
    for (std::size_t r = 0; r < some; ++r) {
      starts[r] = least_of(first, count);
      places[r] = place_of(
          starts[r], count, [first](auto d, std::size_t at) HWY_ATTR { return hn::LoadU(d, first + at); },
          [first](std::size_t at) { return first[at]; });
      first[places[r]] = std::numeric_limits<float>::infinity();
    }
    for (std::size_t r = 0; r < kRows; ++r) rows[r] = cross + places[std::min(r, some - 1)] * count;
    least_sums(second, rows, count, sums);
    for (std::size_t r = 0; r < some; ++r) {
      if (starts[r] + sums[r] >= least) continue;
      least = starts[r] + sums[r];
      best = places[r];
      rest = sums[r];
    }
  }
  const float* row = cross + best * count;
  const std::size_t j = place_of(
      rest, count, [=](auto d, std::size_t at) HWY_ATTR { return hn::Add(hn::LoadU(d, second + at), hn::LoadU(d, row + at)); },
      [=](std::size_t at) { return second[at] + row[at]; });
  return {static_cast<std::uint16_t>(best), static_cast<std::uint16_t>(j)};
}

}  // namespace HWY_NAMESPACE
}  // namespace veloxquant
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace veloxquant {

HWY_EXPORT(nearest_pair);

CodePair nearest_pair(float* first, const float* second, const float* cross, std::size_t count, std::size_t beam) {
  return HWY_DYNAMIC_DISPATCH(nearest_pair)(first, second, cross, count, beam);
}

}  // namespace veloxquant
#endif
