#include "veloxquant/cache/restore_graph.h"

#include <cmath>
#include <stdexcept>

#include "mlx/ops.h"
#include "veloxquant/quantize/turboquant.h"

namespace veloxquant {
namespace {

mx::array as_array(const Tensor& tensor) { return mx::array(tensor.values.data(), mx::Shape(tensor.shape.begin(), tensor.shape.end())); }

// What storing as IEEE half does to a value.
mx::array through_half(const mx::array& x) { return mx::astype(mx::astype(x, mx::float16), mx::float32); }

// Calls `restore` on groups of `size` along the last axis, [..., groups, size]; the last group may be shorter.
template <class RestoreGroups>
mx::array over_groups(const mx::array& x, int size, const RestoreGroups& restore) {
  const int length = x.shape(-1), whole = length / size * size;
  const auto part = [&](int begin, int end, int group) {
    mx::Shape start(x.ndim(), 0), stop = x.shape(), grouped = x.shape();
    start.back() = begin;
    stop.back() = end;
    grouped.back() = (end - begin) / group;
    grouped.push_back(group);
    auto shape = stop;
    shape.back() = end - begin;
    return mx::reshape(restore(mx::reshape(mx::slice(x, start, stop), grouped)), shape);
  };
  std::vector<mx::array> parts;
  if (whole > 0) parts.push_back(part(0, whole, size));
  if (whole < length) parts.push_back(part(whole, length, length - whole));
  return parts.size() == 1 ? parts[0] : mx::concatenate(parts, -1);
}

// Same steps as quantize/affine.cpp: the end of the larger magnitude is exact, and zero falls on a level.
mx::array restore_affine_groups(const mx::array& x, int bits) {
  const float levels = static_cast<float>((1 << bits) - 1);
  const auto low = mx::min(x, -1, true), high = mx::max(x, -1, true);
  const auto low_is_larger = mx::greater(mx::abs(low), mx::abs(high));
  const auto step = mx::maximum(mx::divide(mx::subtract(high, low), mx::array(levels)), mx::array(1e-7f));
  const auto signed_step = mx::where(low_is_larger, step, mx::negative(step));
  const auto edge = mx::where(low_is_larger, low, high);
  const auto zero_code = mx::round(mx::divide(edge, signed_step));
  const auto has_zero = mx::not_equal(zero_code, mx::array(0.0f));
  const auto divisor = mx::where(has_zero, zero_code, mx::array(1.0f));
  const auto scale = mx::where(has_zero, mx::divide(edge, divisor), signed_step);
  const auto bias = mx::where(has_zero, edge, mx::array(0.0f));
  const auto codes = mx::clip(mx::round(mx::divide(mx::subtract(x, bias), scale)), mx::array(0.0f), mx::array(levels));
  return mx::add(mx::multiply(codes, through_half(scale)), through_half(bias));
}

RestoreGraph affine_graph(const QuantizerParameters& parameters, const Quantizer&) {
  const int bits = static_cast<int>(parameters.numbers.at("bits")), group = static_cast<int>(parameters.numbers.at("group_size"));
  return [=](const mx::array& x) { return over_groups(x, group, [=](const mx::array& groups) { return restore_affine_groups(groups, bits); }); };
}

}  // namespace

RestoreGraph restore_graph(const QuantizerParameters&, const Quantizer&) { throw std::logic_error("x"); }

}  // namespace veloxquant
