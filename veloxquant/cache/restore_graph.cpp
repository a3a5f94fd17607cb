#include "veloxquant/cache/restore_graph.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "mlx/ops.h"
#include "veloxquant/kernels/hadamard.h"
#include "veloxquant/quantize/lloyd_max.h"
#include "veloxquant/quantize/rotated_pq.h"
#include "veloxquant/quantize/turboquant.h"

namespace veloxquant {
namespace {

constexpr int kKiviGroup = 32;

mx::array as_array(const Tensor& tensor) {
  return mx::array(tensor.values.data(), mx::Shape(tensor.shape.begin(), tensor.shape.end()));
}

mx::array number(double value) {
  return mx::array(static_cast<float>(value));
}

// What storing as IEEE half does to a value.
mx::array through_half(const mx::array& x) {
  return mx::astype(mx::astype(mx::clip(x, number(-65504), number(65504)), mx::float16), mx::float32);
}

int bits_of(const QuantizerParameters& parameters) {
  return static_cast<int>(parameters.numbers.at("bits"));
}

// Calls `restore` on x as [..., groups, size] along the last axis; the last group may be shorter.
mx::array over_groups(const mx::array& x, int size, const RestoreGraph& restore) {
  const int length = x.shape(-1), whole = length / size * size;
  const auto part = [&](int begin, int end, int group) {
    mx::Shape start(x.ndim(), 0), stop = x.shape(), grouped = x.shape();
    start.back() = begin;
    stop.back() = end;
    grouped.back() = (end - begin) / group;
    grouped.push_back(group);
    mx::Shape shape = x.shape();
    shape.back() = end - begin;
    return mx::reshape(restore(mx::reshape(mx::slice(x, start, stop), grouped)), shape);
  };
  if (whole == 0) return part(0, length, length);
  if (whole == length) return part(0, whole, size);
  return mx::concatenate({part(0, whole, size), part(whole, length, length - whole)}, -1);
}

mx::array codes_of(const mx::array& x, const mx::array& offset, const mx::array& step, int bits) {
  const auto usable = mx::not_equal(step, number(0));
  const auto codes = mx::round(mx::divide(mx::subtract(x, offset), mx::where(usable, step, number(1))));
  return mx::where(usable, mx::clip(codes, number(0), number((1 << bits) - 1)), number(0));
}

// The steps of quantize/affine.cpp on groups [..., size].
mx::array restore_affine_groups(const mx::array& x, int bits) {
  const auto low = mx::min(x, -1, true), high = mx::max(x, -1, true);
  const auto low_is_larger = mx::greater(mx::abs(low), mx::abs(high));
  const auto width = mx::maximum(mx::divide(mx::subtract(high, low), number((1 << bits) - 1)), number(1e-7));
  const auto signed_width = mx::where(low_is_larger, width, mx::negative(width));
  const auto edge = mx::where(low_is_larger, low, high);
  const auto zero_code = mx::round(mx::divide(edge, signed_width));
  const auto shifted = mx::not_equal(zero_code, number(0));
  const auto scale = through_half(mx::where(shifted, mx::divide(edge, mx::where(shifted, zero_code, number(1))), signed_width));
  const auto bias = through_half(mx::where(shifted, edge, number(0)));
  return mx::add(mx::multiply(codes_of(x, bias, scale, bits), scale), bias);
}

RestoreGraph affine_graph(const QuantizerParameters& parameters, const Quantizer&) {
  const int bits = bits_of(parameters), group = static_cast<int>(parameters.numbers.at("group_size"));
  return [=](const mx::array& x) {
    return over_groups(x, group, [=](const mx::array& groups) { return restore_affine_groups(groups, bits); });
  };
}

// The steps of quantize/kivi.cpp on groups [..., size].
mx::array restore_kivi_groups(const mx::array& x, int bits) {
  const auto low = mx::min(x, -1, true), high = mx::max(x, -1, true), stored_low = through_half(low);
  const auto step = through_half(mx::divide(mx::subtract(high, stored_low), number((1 << bits) - 1)));
  return mx::add(mx::multiply(codes_of(x, stored_low, step, bits), step), stored_low);
}

RestoreGraph kivi_graph(const QuantizerParameters& parameters, const Quantizer&) {
  const auto restore = [bits = bits_of(parameters)](const mx::array& groups) { return restore_kivi_groups(groups, bits); };
  if (parameters.side == Side::kValues) return [restore](const mx::array& x) { return over_groups(x, kKiviGroup, restore); };
  return [restore](const mx::array& x) { return mx::swapaxes(over_groups(mx::swapaxes(x, -1, -2), kKiviGroup, restore), -1, -2); };
}

RestoreGraph turboquant_graph(const QuantizerParameters& parameters, const Quantizer& quantizer) {
  const int dim = parameters.dim;
  const auto rotation = static_cast<const TurboQuantizer&>(quantizer).rotation_matrix();
  const mx::array matrix(rotation.data(), {dim, dim});
  const LloydMax& table = lloyd_max(bits_of(parameters));
  const mx::array levels(table.levels.data(), {static_cast<int>(table.levels.size())});
  return [=, boundaries = table.boundaries](const mx::array& x) {
    const auto rotated = mx::matmul(x, mx::transpose(matrix));
    const auto norm = mx::sqrt(mx::sum(mx::square(rotated), -1, true));
    const auto unit = mx::divide(mx::multiply(rotated, number(std::sqrt(dim))), mx::maximum(norm, number(1e-30)));
    auto codes = mx::zeros(x.shape(), mx::int32);
    for (const float boundary : boundaries) codes = mx::add(codes, mx::astype(mx::greater(unit, mx::array(boundary)), mx::int32));
    const auto scaled = mx::multiply(mx::take(levels, codes, 0), mx::divide(through_half(norm), number(std::sqrt(dim))));
    return mx::matmul(scaled, matrix);
  };
}

// x [rows, dim] → the nearest centroids of a codebook [subspaces, centroids, width].
mx::array restore_product(const mx::array& x, const mx::array& codebook) {
  const int rows = x.shape(0), subspaces = codebook.shape(0), centroids = codebook.shape(1), width = codebook.shape(2);
  const auto pieces = mx::transpose(mx::reshape(x, {rows, subspaces, width}), {1, 0, 2});
  const auto half_norms = mx::multiply(number(0.5), mx::sum(mx::square(codebook), -1));
  const auto scores =
      mx::subtract(mx::reshape(half_norms, {subspaces, 1, centroids}), mx::matmul(pieces, mx::transpose(codebook, {0, 2, 1})));
  const auto codes = mx::astype(mx::argmin(scores, -1), mx::int32);  // [subspaces, rows]
  const auto first = mx::reshape(mx::multiply(mx::arange(subspaces, mx::int32), mx::array(centroids)), {subspaces, 1});
  const auto nearest = mx::take(mx::reshape(codebook, {subspaces * centroids, width}), mx::add(codes, first), 0);
  return mx::reshape(mx::transpose(nearest, {1, 0, 2}), x.shape());
}

RestoreGraph vecinfer_graph(const QuantizerParameters& parameters, const Quantizer&) {
  const int dim = parameters.dim;
  const mx::array codebook = as_array(parameters.tensors.at("codebook"));
  const auto restore = [=](const mx::array& x) {
    return mx::reshape(restore_product(mx::reshape(x, {-1, dim}), codebook), x.shape());
  };
  if (parameters.side == Side::kValues) return restore;
  const mx::array factors = as_array(parameters.tensors.at("smooth_factors"));
  const auto matrix = walsh_hadamard_matrix(static_cast<std::size_t>(dim));
  const mx::array transform(matrix.data(), {dim, dim});
  return [=](const mx::array& x) {
    const auto transformed = mx::matmul(mx::divide(x, factors), transform);
    return mx::multiply(mx::matmul(restore(transformed), transform), factors);
  };
}

// The worst of each block of tokens get 4-bit residuals: z and what was looked up of it, [B, H, T, dim] → patched.
mx::array patched(const mx::array& z, const mx::array& looked_up, int patches) {
  constexpr int kBlock = static_cast<int>(RotatedPqQuantizer::kBlockTokens);
  const auto rest = mx::subtract(z, looked_up);
  const auto errors = mx::sum(mx::square(rest), -1);  // [B, H, T]
  const int tokens = z.shape(2);
  std::vector<mx::array> worst;
  for (int begin = 0; begin < tokens; begin += kBlock) {
    const int size = std::min(kBlock, tokens - begin);
    const auto count =
        static_cast<int>(RotatedPqQuantizer::patches_of(static_cast<std::size_t>(patches), static_cast<std::size_t>(size)));
    const auto some = mx::slice(errors, {0, 0, begin}, {z.shape(0), z.shape(1), begin + size});
    // Rank by counting what is worse, or as bad and earlier: exact for equal errors.
    const auto mine = mx::expand_dims(some, -1), others = mx::expand_dims(some, -2);
    const auto place = mx::arange(size);
    const auto earlier = mx::less(mx::expand_dims(place, 0), mx::expand_dims(place, 1));
    const auto ahead = mx::logical_or(mx::greater(others, mine), mx::logical_and(mx::equal(others, mine), earlier));
    worst.push_back(mx::less(mx::sum(mx::astype(ahead, mx::int32), -1), mx::array(count)));
  }
  const auto chosen = mx::expand_dims(worst.size() == 1 ? worst[0] : mx::concatenate(worst, -1), -1);
  const auto centre = number(RotatedPqQuantizer::kPatchCentre);
  const auto scale = through_half(mx::divide(mx::max(mx::abs(rest), -1, true), centre));
  const auto usable = mx::greater(scale, number(0));
  const auto codes = mx::clip(mx::round(mx::add(mx::divide(rest, mx::where(usable, scale, number(1))), centre)), number(0),
                              number(2 * RotatedPqQuantizer::kPatchCentre));
  const auto patch = mx::multiply(scale, mx::subtract(codes, centre));
  return mx::where(chosen, mx::add(looked_up, patch), looked_up);
}

// Rows z [N, width] → the nearest sum of an entry of each of two tables [count, width], sought from the nearest of the first.
mx::array restore_pairs(const mx::array& z, const mx::array& first, const mx::array& second) {
  const int beam = std::min(RotatedPqQuantizer::kBeam, first.shape(0));
  const auto half_norms = [](const mx::array& table) { return mx::multiply(number(0.5), mx::sum(mx::square(table), -1)); };
  const auto first_scores = mx::subtract(half_norms(first), mx::matmul(z, mx::transpose(first)));
  const auto second_scores = mx::subtract(half_norms(second), mx::matmul(z, mx::transpose(second)));
  const auto tried = mx::slice(mx::argsort(first_scores, -1), {0, 0}, {z.shape(0), beam});  // [N, beam]
  const auto cross = mx::take(mx::matmul(first, mx::transpose(second)), tried, 0);          // [N, beam, count]
  const auto sums = mx::add(mx::expand_dims(second_scores, 1), cross);
  const auto totals = mx::add(mx::take_along_axis(first_scores, tried, -1), mx::min(sums, -1));
  const auto best = mx::argmin(totals, -1, true);  // [N, 1]
  const auto first_code = mx::take_along_axis(tried, best, -1);
  const auto second_codes = mx::argmin(sums, -1);  // [N, beam]
  const auto second_code = mx::take_along_axis(second_codes, best, -1);
  return mx::add(mx::take(first, mx::squeeze(first_code, -1), 0), mx::take(second, mx::squeeze(second_code, -1), 0));
}

mx::array restore_single(const mx::array& z, const mx::array& table) {
  const auto scores = mx::subtract(mx::multiply(number(0.5), mx::sum(mx::square(table), -1)), mx::matmul(z, mx::transpose(table)));
  return mx::take(table, mx::argmin(scores, -1), 0);
}

RestoreGraph rotated_pq_graph(const QuantizerParameters&, const Quantizer& quantizer) {
  const auto& rotated = static_cast<const RotatedPqQuantizer&>(quantizer);
  const int dim = rotated.dim(), patches = rotated.patches();
  const auto array = [](std::span<const float> values, mx::Shape shape) { return mx::array(values.data(), std::move(shape)); };
  const auto mean = array(rotated.mean(), {dim}), transform = array(rotated.transform(), {dim, dim}),
             inverse = array(rotated.inverse(), {dim, dim});
  std::vector<std::vector<mx::array>> tables;
  for (const auto& subspace : rotated.subspaces()) {
    tables.emplace_back();
    for (int stage = 0; stage < subspace.stages(); ++stage)
      tables.back().push_back(mx::array(subspace.entry(stage, 0), {subspace.num_centroids(), subspace.dim()}));
  }
  return [=](const mx::array& x) {
    const auto z = mx::matmul(mx::subtract(x, mean), transform);
    const auto rows = mx::reshape(z, {-1, dim});
    std::vector<mx::array> pieces;
    int begin = 0;
    for (const auto& stages : tables) {
      const int width = stages[0].shape(1);
      const auto piece = mx::slice(rows, {0, begin}, {rows.shape(0), begin + width});
      pieces.push_back(stages.size() == 1 ? restore_single(piece, stages[0]) : restore_pairs(piece, stages[0], stages[1]));
      begin += width;
    }
    auto looked_up = mx::reshape(mx::concatenate(pieces, -1), x.shape());
    if (patches > 0) looked_up = patched(z, looked_up, patches);
    return mx::add(mx::matmul(looked_up, inverse), mean);
  };
}

struct Row {
  std::string_view method;
  RestoreGraph (*make)(const QuantizerParameters& parameters, const Quantizer& quantizer);
};

constexpr Row kTable[] = {{"affine", affine_graph},
                          {"kivi", kivi_graph},
                          {"turboquant", turboquant_graph},
                          {"vecinfer", vecinfer_graph},
                          {"rotated_pq", rotated_pq_graph}};

}  // namespace

RestoreGraph restore_graph(const QuantizerParameters& parameters, const Quantizer& quantizer) {
  for (const auto& row : kTable)
    if (row.method == parameters.method) return row.make(parameters, quantizer);
  throw std::logic_error("no graph for the method " + parameters.method);
}

}  // namespace veloxquant
