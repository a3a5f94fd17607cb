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

// Takes the smallest of x [count] out, one after another; of equal ones the first.  x is in four parts, of which the minima by
// lanes are kept: only the part that one was taken from is looked at again.
class Ascending {
 public:
  static bool serves(std::size_t count) { return count % (kParts * hn::Lanes(D())) == 0; }

  HWY_INLINE Ascending(float* x, std::size_t count) : x_(x), part_(count / kParts), lanes_(hn::Lanes(D())) {
    for (std::size_t part = 0; part < kParts; ++part) minima_[part] = minimum_of(part);
  }

  // Its place, infinity from now on.
  HWY_INLINE std::size_t take(float& value) {
    const D d;
    const auto least = hn::MinOfLanes(d, hn::Min(hn::Min(minima_[0], minima_[1]), hn::Min(minima_[2], minima_[3])));
    value = hn::GetLane(least);
    for (std::size_t part = 0; part < kParts; ++part) {
      if (hn::AllFalse(d, hn::Eq(minima_[part], least))) continue;
      for (std::size_t i = part * part_; i < (part + 1) * part_; i += lanes_) {
        const std::intptr_t found = hn::FindFirstTrue(d, hn::Eq(hn::LoadU(d, x_ + i), least));
        if (found < 0) continue;
        const std::size_t place = i + static_cast<std::size_t>(found);
        x_[place] = std::numeric_limits<float>::infinity();
        minima_[part] = minimum_of(part);
        return place;
      }
    }
    return 0;  // only for values that are not numbers
  }

 private:
  using D = hn::ScalableTag<float>;
  static constexpr std::size_t kParts = 4;

  HWY_INLINE hn::Vec<D> minimum_of(std::size_t part) const {
    const D d;
    auto least = hn::LoadU(d, x_ + part * part_);
    for (std::size_t i = part * part_ + lanes_; i < (part + 1) * part_; i += lanes_) least = hn::Min(least, hn::LoadU(d, x_ + i));
    return least;
  }

  float* x_;
  std::size_t part_, lanes_;
  hn::Vec<D> minima_[kParts];
};

// The same of any count.
class AscendingOneByOne {
 public:
  HWY_INLINE AscendingOneByOne(float* x, std::size_t count) : x_(x), count_(count) {}

  HWY_INLINE std::size_t take(float& value) {
    const float* x = x_;
    value = least_of(x, count_);
    const std::size_t place = place_of(
        value, count_, [x](auto d, std::size_t at) HWY_ATTR { return hn::LoadU(d, x + at); },
        [x](std::size_t at) { return x[at]; });
    x_[place] = std::numeric_limits<float>::infinity();
    return place;
  }

 private:
  float* x_;
  std::size_t count_;
};

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

template <class Order>
HWY_INLINE CodePair nearest_pair_of(Order order, const float* second, const float* cross, std::size_t count, std::size_t beam) {
  std::size_t best = 0;
  float least = std::numeric_limits<float>::infinity(), rest = least;
  for (std::size_t k = 0; k < beam; k += kRows) {
    const std::size_t some = std::min(kRows, beam - k);
    std::size_t places[kRows];
    float starts[kRows], sums[kRows];
    const float* rows[kRows];
    for (std::size_t r = 0; r < some; ++r) places[r] = order.take(starts[r]);
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

CodePair nearest_pair(float* first, const float* second, const float* cross, std::size_t count, std::size_t beam) {
  if (Ascending::serves(count)) return nearest_pair_of(Ascending(first, count), second, cross, count, beam);
  return nearest_pair_of(AscendingOneByOne(first, count), second, cross, count, beam);
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
