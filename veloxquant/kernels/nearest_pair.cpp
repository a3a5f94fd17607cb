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

// The smallest of sum(i) over i < count; `scalar` gives one value.
template <class Sum, class Scalar>
float least_of(std::size_t count, Sum sum, Scalar scalar) {
  const hn::ScalableTag<float> d;
  const std::size_t lanes = hn::Lanes(d), whole = count / lanes * lanes;
  auto least = hn::Set(d, std::numeric_limits<float>::infinity()), other = least;
  std::size_t i = 0;
  for (; i + 2 * lanes <= whole; i += 2 * lanes) {
    least = hn::Min(least, sum(d, i));
    other = hn::Min(other, sum(d, i + lanes));
  }
  if (i < whole) least = hn::Min(least, sum(d, i));
  float value = hn::GetLane(hn::MinOfLanes(d, hn::Min(least, other)));
  for (i = whole; i < count; ++i) value = std::min(value, scalar(i));
  return value;
}

// Where it is first.
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

CodePair nearest_pair(float* first, const float* second, const float* cross, std::size_t count, std::size_t beam) {
  const auto load_first = [first](auto d, std::size_t at) HWY_ATTR { return hn::LoadU(d, first + at); };
  const auto first_at = [first](std::size_t at) { return first[at]; };
  std::size_t best = 0;
  float least = std::numeric_limits<float>::infinity(), rest = least;
  for (std::size_t k = 0; k < beam; ++k) {
    const float start = least_of(count, load_first, first_at);
    const std::size_t i = place_of(start, count, load_first, first_at);
    const float* row = cross + i * count;
    const float more = least_of(
        count, [=](auto d, std::size_t at) HWY_ATTR { return hn::Add(hn::LoadU(d, second + at), hn::LoadU(d, row + at)); },
        [=](std::size_t at) { return second[at] + row[at]; });
    if (start + more < least) {
      least = start + more;
      best = i;
      rest = more;
    }
    first[i] = std::numeric_limits<float>::infinity();
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
