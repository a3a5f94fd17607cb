#include "veloxquant/cache/method_graph.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <memory>
#include <numeric>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>

#include "mlx/ops.h"
#include "veloxquant/kernels/hadamard.h"
#include "veloxquant/kernels/ordered_product.h"
#include "veloxquant/model/cpu_operation.h"
#include "veloxquant/quantize/lloyd_max.h"
#include "veloxquant/quantize/rotated_pq.h"
#include "veloxquant/quantize/turboquant.h"
#include "veloxquant/quantize/vecinfer.h"

namespace veloxquant {

mx::array part(const mx::array& x, int axis, int begin, int end) {
  if (begin == 0 && end == x.shape(axis)) return x;
  const auto at = static_cast<std::size_t>(axis < 0 ? static_cast<int>(x.ndim()) + axis : axis);
  mx::Shape start(x.ndim(), 0), stop = x.shape();
  start[at] = begin;
  stop[at] = end;
  return mx::slice(x, start, stop);
}

mx::array number(double value) {
  return mx::array(static_cast<float>(value));
}

int bits_of(const QuantizerParameters& parameters) {
  return static_cast<int>(parameters.numbers.at("bits"));
}

namespace {

mx::array as_array(std::span<const float> values, mx::Shape shape) {
  return mx::array(values.data(), std::move(shape));
}

mx::Shape with_last(mx::Shape shape, std::initializer_list<int> last) {
  shape.pop_back();
  for (const int size : last) shape.push_back(size);
  return shape;
}

mx::array pad_last_axis(const mx::array& x, int length, const char* mode = "constant") {
  if (length == x.shape(-1)) return x;
  std::vector<std::pair<int, int>> widths(x.ndim());
  widths.back().second = length - x.shape(-1);
  return mx::pad(x, widths, mx::array(0, x.dtype()), mode);
}

int packed_bytes(const BitField& field) {
  return (field.count * field.bits + 7) / 8;
}

// Codes and bytes are both whole numbers of digits of so many bits.
int digit_bits(const BitField& field) {
  return std::gcd(field.bits, 8);
}

mx::Dtype type_of(const BitField& field) {
  return field.bits > 8 ? mx::uint16 : mx::uint8;
}

// How far each of `count` digits is shifted in a number.
mx::array shifts(int count, int digit, mx::Dtype type) {
  return mx::multiply(mx::arange(count, type), mx::array(digit, type));
}

// [..., n] → [..., n · count] digits of each, and back.
mx::array to_digits(const mx::array& x, int count, int digit) {
  if (count == 1) return x;
  const auto digits = mx::bitwise_and(mx::right_shift(mx::expand_dims(x, -1), shifts(count, digit, x.dtype())),
                                      mx::array((1 << digit) - 1, x.dtype()));
  return mx::flatten(digits, -2, -1);
}

mx::array from_digits(const mx::array& digits, int count, int digit) {
  if (count == 1) return digits;
  const auto grouped = mx::reshape(digits, with_last(digits.shape(), {digits.shape(-1) / count, count}));
  return mx::astype(mx::sum(mx::left_shift(grouped, shifts(count, digit, digits.dtype())), -1), digits.dtype());
}

}  // namespace

int packed_bytes(const std::vector<BitField>& layout) {
  int bytes = 0;
  for (const auto& field : layout) bytes += packed_bytes(field);
  return bytes;
}

mx::array pack_fields(const std::vector<mx::array>& fields, const std::vector<BitField>& layout) {
  std::vector<mx::array> packed;
  for (std::size_t i = 0; i < layout.size(); ++i) {
    const int digit = digit_bits(layout[i]), per_byte = 8 / digit;
    const auto digits = to_digits(mx::astype(fields[i], type_of(layout[i])), layout[i].bits / digit, digit);
    packed.push_back(
        from_digits(pad_last_axis(mx::astype(digits, mx::uint8), packed_bytes(layout[i]) * per_byte), per_byte, digit));
  }
  return packed.size() == 1 ? packed[0] : mx::concatenate(packed, -1);
}

std::vector<mx::array> unpack_fields(const mx::array& bytes, const std::vector<BitField>& layout) {
  std::vector<mx::array> fields;
  int begin = 0;
  for (const auto& field : layout) {
    const int end = begin + packed_bytes(field), digit = digit_bits(field), per_number = field.bits / digit;
    const auto digits = to_digits(part(bytes, -1, begin, end), 8 / digit, digit);
    fields.push_back(from_digits(mx::astype(part(digits, -1, 0, field.count * per_number), type_of(field)), per_number, digit));
    begin = end;
  }
  return fields;
}

mx::array half_bits(const mx::array& x) {
  return mx::view(mx::astype(mx::clip(x, number(-65504), number(65504)), mx::float16), mx::uint16);
}

mx::array from_half_bits(const mx::array& bits) {
  return mx::astype(mx::view(bits, mx::float16), mx::float32);
}

mx::array in_groups(const mx::array& x, int size) {
  const int groups = (x.shape(-1) + size - 1) / size;
  return mx::reshape(pad_last_axis(x, groups * size, "edge"), with_last(x.shape(), {groups, size}));
}

mx::array out_of_groups(const mx::array& groups, int length) {
  return part(mx::flatten(groups, -2, -1), -1, 0, length);
}

mx::array codes_of(const mx::array& x, const mx::array& offset, const mx::array& step, int bits) {
  const auto usable = mx::not_equal(step, number(0));
  const auto codes = mx::round(mx::divide(mx::subtract(x, offset), mx::where(usable, step, number(1))));
  return mx::where(usable, mx::clip(codes, number(0), number((1 << bits) - 1)), number(0));
}

mx::array MethodGraph::decode(const mx::array& bytes) const {
  return back(look_up(unpack_fields(bytes, layout)), number(1));
}

namespace {

mx::array as_it_is(const mx::array& x) {
  return x;
}

// Codes are what our quantizers choose, bit for bit, where our kernels run: MLX's products there are a library's, which round by
// the processor and by the number of rows.

// x [..., n] · matrix [n, n], before codes are chosen.
mx::array rotated(const mx::array& x, const mx::array& matrix) {
  if (!own_kernels()) return mx::matmul(x, matrix);
  return cpu_operation("Rotate", {mx::contiguous(x), mx::contiguous(matrix)}, {x.shape()},
                       [](const std::vector<mx::array>& in, std::vector<mx::array>& out) {
                         const auto n = static_cast<std::size_t>(in[1].shape(0));
                         ordered_product(in[0].data<float>(), in[0].size() / n, n, n, in[1].data<float>(), n, nullptr,
                                         out[0].data<float>(), n);
                       })[0];
}

mx::array hadamard_rows(const mx::array& x, const mx::array& matrix) {
  if (!own_kernels()) return mx::matmul(x, matrix);
  return cpu_operation("Hadamard", {mx::contiguous(x)}, {x.shape()},
                       [](const std::vector<mx::array>& in, std::vector<mx::array>& out) {
                         std::copy_n(in[0].data<float>(), in[0].size(), out[0].data<float>());
                         const auto n = static_cast<std::size_t>(in[0].shape(-1));
                         hadamard(out[0].data<float>(), in[0].size() / n, n);
                       })[0];
}

// Rows of rotated vectors [rows, dim] → codes [rows, codes].
using ChooseCodes = std::function<void(std::span<const float> z, std::span<std::uint16_t> codes)>;

// Of methods whose own space is the vectors': weights do not matter.
mx::array sums_as_they_are(const mx::array& sums, const mx::array&) {
  return sums;
}

// The steps of quantize/affine.cpp on groups [..., size]: the bits of scale and bias, and codes.
std::vector<mx::array> quantise_affine_groups(const mx::array& x, int bits) {
  const auto low = mx::min(x, -1, true), high = mx::max(x, -1, true);
  const auto low_is_larger = mx::greater(mx::abs(low), mx::abs(high));
  const auto width = mx::maximum(mx::divide(mx::subtract(high, low), number((1 << bits) - 1)), number(1e-7));
  const auto signed_width = mx::where(low_is_larger, width, mx::negative(width));
  const auto edge = mx::where(low_is_larger, low, high);
  const auto zero_code = mx::round(mx::divide(edge, signed_width));
  const auto shifted = mx::not_equal(zero_code, number(0));
  const auto scale = half_bits(mx::where(shifted, mx::divide(edge, mx::where(shifted, zero_code, number(1))), signed_width));
  const auto bias = half_bits(mx::where(shifted, edge, number(0)));
  return {scale, bias, codes_of(x, from_half_bits(bias), from_half_bits(scale), bits)};
}

MethodGraph affine_graph(const QuantizerParameters& parameters, const std::shared_ptr<const Quantizer>&) {
  const int bits = bits_of(parameters), size = static_cast<int>(parameters.numbers.at("group_size")), dim = parameters.dim,
            groups = (dim + size - 1) / size;
  const auto quantise = [=](const mx::array& x) {
    const auto parts = quantise_affine_groups(in_groups(x, size), bits);
    return std::vector<mx::array>{mx::flatten(mx::concatenate({parts[0], parts[1]}, -1), -2, -1), out_of_groups(parts[2], dim)};
  };
  const auto look_up = [=](const std::vector<mx::array>& fields) {
    const auto halves = from_half_bits(in_groups(fields[0], 2));
    const auto codes = mx::astype(in_groups(fields[1], size), mx::float32);
    return out_of_groups(mx::add(mx::multiply(codes, part(halves, -1, 0, 1)), part(halves, -1, 1, 2)), dim);
  };
  return {{{2 * groups, 16}, {dim, bits}}, as_it_is, quantise, look_up, sums_as_they_are};
}

MethodGraph turboquant_graph(const QuantizerParameters& parameters, const std::shared_ptr<const Quantizer>& quantizer) {
  const int dim = parameters.dim, bits = bits_of(parameters);
  const auto matrix = as_array(static_cast<const TurboQuantizer&>(*quantizer).rotation_matrix(), {dim, dim});
  const LloydMax& table = lloyd_max(bits);
  const auto levels = as_array(table.levels, {static_cast<int>(table.levels.size())});
  const auto quantise = [=, boundaries = table.boundaries](const mx::array& rotated) {
    const auto norm = mx::sqrt(mx::sum(mx::square(rotated), -1, true));
    const auto unit = mx::divide(mx::multiply(rotated, number(std::sqrt(dim))), mx::maximum(norm, number(1e-30)));
    auto codes = mx::zeros(rotated.shape(), mx::uint8);
    for (const float boundary : boundaries) codes = mx::add(codes, mx::astype(mx::greater(unit, mx::array(boundary)), mx::uint8));
    return std::vector<mx::array>{half_bits(norm), codes};
  };
  const auto look_up = [=](const std::vector<mx::array>& fields) {
    return mx::multiply(mx::take(levels, fields[1], 0), mx::divide(from_half_bits(fields[0]), number(std::sqrt(dim))));
  };
  return {{{1, 16}, {dim, bits}},
          [=](const mx::array& x) { return rotated(x, mx::transpose(matrix)); },
          quantise,
          look_up,
          [=](const mx::array& sums, const mx::array&) { return mx::matmul(sums, matrix); }};
}

// Codebooks of sub-spaces that stand side by side, their widths filled up to one so that all are handled at once.  A sub-space of
// one stage among those of two has a second table of zeros.
class Codebooks {
 public:
  // tables [stages, centroids, width] of each sub-space.
  struct Subspace {
    int stages, width;
    const float* tables;
  };

  // choose: empty, or what chooses the same codes where our kernels run.
  Codebooks(const std::vector<Subspace>& subspaces, int centroids, ChooseCodes choose)
      : count_(static_cast<int>(subspaces.size())), centroids_(centroids), choose_(std::move(choose)) {
    int dim = 0;
    bool alike = true;
    for (const auto& subspace : subspaces) {
      codes_ += subspace.stages;
      stages_ = std::max(stages_, subspace.stages);
      width_ = std::max(width_, subspace.width);
      alike &= subspace.width == subspaces[0].width;
      dim += subspace.width;
    }
    const int entries = std::max(centroids, kEntries);
    std::vector<float> tables(static_cast<std::size_t>(count_ * stages_ * entries * width_));
    std::vector<float> half_norms(static_cast<std::size_t>(count_ * stages_ * centroids));
    std::vector<int> into(static_cast<std::size_t>(count_ * width_), dim), out_of;
    for (int s = 0, column = 0; s < count_; ++s) {
      auto [stages, width, from] = subspaces[static_cast<std::size_t>(s)];
      for (int row = 0; row < stages * centroids; ++row, from += width) {
        const int table = s * stages_ + row / centroids, entry = row % centroids;
        std::copy_n(from, width, tables.begin() + (table * entries + entry) * width_);
        half_norms[static_cast<std::size_t>(table * centroids + entry)] = 0.5f * std::inner_product(from, from + width, from, 0.0f);
      }
      for (int i = 0; i < width; ++i, ++column) {
        into[static_cast<std::size_t>(s * width_ + i)] = column;
        out_of.push_back(s * width_ + i);
      }
    }
    tables_ = as_array(tables, {count_ * stages_ * entries, width_});
    std::vector<int> first(static_cast<std::size_t>(count_ * stages_));
    for (int i = 0; i < count_ * stages_; ++i) first[static_cast<std::size_t>(i)] = i * entries;
    first_entries_ = mx::array(first.data(), {count_, stages_});
    if (!alike) into_ = mx::array(into.data(), {count_ * width_}), out_of_ = mx::array(out_of.data(), {dim});
    half_norms_ = mx::array(half_norms.data(), {count_, stages_, centroids});
  }

  int codes() const { return codes_; }

  // z [..., dim] → codes [..., codes], sub-space after sub-space.
  mx::array nearest(const mx::array& z) const {
    const int dim = z.shape(-1), rows = static_cast<int>(z.size()) / dim;
    if (choose_ && own_kernels()) return chosen(z);
    auto wide = mx::reshape(z, {rows, dim});
    if (into_) wide = mx::take(pad_last_axis(wide, dim + 1), *into_, -1);
    const auto pieces = mx::transpose(mx::reshape(wide, {rows, count_, width_}), {1, 0, 2});
    std::vector<mx::array> found;
    const int step = std::max(1, kFloatsAtOnce / (count_ * centroids_ * (stages_ == 2 ? kBeam : 1)));
    for (int begin = 0; begin < rows; begin += step) {
      auto some = mx::slice(pieces, {0, begin, 0}, {count_, std::min(rows, begin + step), width_});
      // One after another: MLX would compute the scores of all of them before it looks at any.
      if (!found.empty()) some = mx::depends({some}, {found.back()})[0];
      found.push_back(mx::swapaxes(stages_ == 2 ? nearest_pairs(some) : mx::argmin(scores(some, 0), -1, true), 0, 1));
    }
    const auto codes = mx::reshape(found.size() == 1 ? found[0] : mx::concatenate(found, 0), {rows, count_ * stages_});
    return mx::reshape(part(codes, -1, 0, codes_), with_last(z.shape(), {codes_}));
  }

  // Codes [..., codes] → z [..., dim].
  mx::array look_up(const mx::array& codes) const {
    const auto all =
        mx::reshape(pad_last_axis(mx::astype(codes, mx::int32), count_ * stages_), with_last(codes.shape(), {count_, stages_}));
    const auto entries = mx::take(tables_, mx::add(all, first_entries_), 0);  // [..., count, stages, width]
    const auto wide = mx::flatten(stages_ == 1 ? mx::squeeze(entries, -2) : mx::sum(entries, -2), -2, -1);
    return out_of_ ? mx::take(wide, *out_of_, -1) : wide;
  }

 private:
  static constexpr int kEntries = 256;  // any byte is a code: those of a damaged file are read as zeros
  static constexpr int kBeam = RotatedPqQuantizer::kBeam;
  static constexpr int kFloatsAtOnce = 1 << 25;  // of scores

  mx::array chosen(const mx::array& z) const {
    return cpu_operation("ChooseCodes", {mx::contiguous(z)}, {with_last(z.shape(), {codes_})},
                         [choose = choose_](const std::vector<mx::array>& in, std::vector<mx::array>& out) {
                           std::vector<std::uint16_t> codes(out[0].size());
                           choose({in[0].data<float>(), in[0].size()}, codes);
                           std::copy(codes.begin(), codes.end(), out[0].data<float>());
                         })[0];
  }

  // The centroids of all sub-spaces: [count, centroids, width].
  mx::array table(int stage) const {
    const auto all = mx::reshape(tables_, {count_, stages_, -1, width_});
    return mx::squeeze(mx::slice(all, {0, stage, 0, 0}, {count_, stage + 1, centroids_, width_}), 1);
  }

  // Pieces [count, rows, width] → half the squared distance to each centroid, but for what all of a row have in common.
  mx::array scores(const mx::array& pieces, int stage) const {
    const auto half_norms = mx::slice(half_norms_, {0, stage, 0}, {count_, stage + 1, centroids_});
    return mx::subtract(half_norms, mx::matmul(pieces, mx::swapaxes(table(stage), 1, 2)));
  }

  // The nearest sum of an entry of each of two tables, sought from the nearest of the first: [count, rows, 2].
  mx::array nearest_pairs(const mx::array& pieces) const {
    const int rows = pieces.shape(1), beam = std::min(kBeam, centroids_);
    const auto first = scores(pieces, 0), second = scores(pieces, 1);
    const auto tried = mx::slice(mx::argsort(first, -1), {0, 0, 0}, {count_, rows, beam});
    const auto rows_of_cross =
        mx::add(mx::astype(tried, mx::int32), mx::reshape(mx::multiply(mx::arange(count_), mx::array(centroids_)), {count_, 1, 1}));
    const auto cross = mx::reshape(mx::matmul(table(0), mx::swapaxes(table(1), 1, 2)), {-1, centroids_});
    const auto sums = mx::add(mx::expand_dims(second, 2), mx::take(cross, rows_of_cross, 0));  // [count, rows, beam, centroids]
    const auto totals = mx::add(mx::take_along_axis(first, tried, -1), mx::min(sums, -1));
    const auto best = mx::argmin(totals, -1, true);
    return mx::concatenate({mx::take_along_axis(tried, best, -1), mx::take_along_axis(mx::argmin(sums, -1), best, -1)}, -1);
  }

  int count_, centroids_, codes_ = 0, stages_ = 1, width_ = 1;
  ChooseCodes choose_;
  mx::array tables_ = mx::array(0.0f), half_norms_ = tables_;  // [count · stages · entries, width], [count, stages, centroids]
  mx::array first_entries_ = tables_;                          // [count, stages]: where each table begins
  std::optional<mx::array> into_, out_of_;                     // columns of pieces and of z, where widths differ
};

MethodGraph vecinfer_graph(const QuantizerParameters& parameters, const std::shared_ptr<const Quantizer>& quantizer) {
  const int dim = parameters.dim;
  const Tensor& tensor = parameters.tensors.at("codebook");
  const auto subspaces = static_cast<std::size_t>(tensor.shape[0]);
  const int centroids = static_cast<int>(tensor.shape[1]), width = static_cast<int>(tensor.shape[2]),
            bits = std::max(1, static_cast<int>(std::bit_width(static_cast<unsigned>(centroids - 1))));
  std::vector<Codebooks::Subspace> parts;
  for (std::size_t s = 0; s < subspaces; ++s)
    parts.push_back({1, width, tensor.values.data() + s * tensor.values.size() / subspaces});
  ChooseCodes choose;
  if (own_kernels())
    choose = [quantizer](auto z, auto codes) { static_cast<const VecInferQuantizer&>(*quantizer).codebook().encode(z, codes); };
  const auto codebooks = std::make_shared<const Codebooks>(parts, centroids, std::move(choose));
  MethodGraph graph{{{codebooks->codes(), bits}},
                    as_it_is,
                    [codebooks](const mx::array& z) { return std::vector<mx::array>{codebooks->nearest(z)}; },
                    [codebooks](const std::vector<mx::array>& fields) { return codebooks->look_up(fields[0]); },
                    sums_as_they_are};
  if (parameters.side == Side::kValues) return graph;
  const auto factors = as_array(parameters.tensors.at("smooth_factors").values, {dim});
  const auto transform = as_array(walsh_hadamard_matrix(static_cast<std::size_t>(dim)), {dim, dim});
  graph.forward = [=](const mx::array& x) { return hadamard_rows(mx::divide(x, factors), transform); };
  graph.back = [=](const mx::array& sums, const mx::array&) { return mx::multiply(mx::matmul(sums, transform), factors); };
  return graph;
}

MethodGraph rotated_pq_graph(const QuantizerParameters&, const std::shared_ptr<const Quantizer>& quantizer) {
  const auto& pq = static_cast<const RotatedPqQuantizer&>(*quantizer);
  const int dim = pq.dim();
  const auto mean = as_array(pq.mean(), {dim}), transform = as_array(pq.transform(), {dim, dim}),
             inverse = as_array(pq.inverse(), {dim, dim});
  std::vector<Codebooks::Subspace> parts;
  for (const auto& subspace : pq.subspaces()) parts.push_back({subspace.stages(), subspace.dim(), subspace.entry(0, 0)});
  ChooseCodes choose;
  if (own_kernels())
    choose = [quantizer](auto z, auto codes) { static_cast<const RotatedPqQuantizer&>(*quantizer).choose_codes(z, codes); };
  const auto codebooks = std::make_shared<const Codebooks>(parts, pq.subspaces()[0].num_centroids(), std::move(choose));
  return {{{codebooks->codes(), 8}},
          [=](const mx::array& x) { return rotated(mx::subtract(x, mean), transform); },
          [codebooks](const mx::array& z) { return std::vector<mx::array>{codebooks->nearest(z)}; },
          [codebooks](const std::vector<mx::array>& fields) { return codebooks->look_up(fields[0]); },
          [=](const mx::array& sums, const mx::array& totals) {
            return mx::add(mx::matmul(sums, inverse), mx::multiply(totals, mean));
          }};
}

struct Row {
  std::string_view method;
  MethodGraph (*make)(const QuantizerParameters& parameters, const std::shared_ptr<const Quantizer>& quantizer);
};

constexpr Row kTable[] = {
    {"affine", affine_graph}, {"turboquant", turboquant_graph}, {"vecinfer", vecinfer_graph}, {"rotated_pq", rotated_pq_graph}};

}  // namespace

MethodGraph method_graph(const QuantizerParameters& parameters, const std::shared_ptr<const Quantizer>& quantizer) {
  for (const auto& row : kTable)
    if (row.method == parameters.method) return row.make(parameters, quantizer);
  throw std::logic_error("no graph for the method " + parameters.method);
}

mx::array largest(const mx::array& errors, int count) {
  // Rank by counting what is larger, or as large and earlier: exact for equal errors.
  const auto mine = mx::expand_dims(errors, -1), others = mx::expand_dims(errors, -2), place = mx::arange(errors.shape(-1));
  const auto earlier = mx::less(mx::expand_dims(place, 0), mx::expand_dims(place, 1));
  const auto ahead = mx::logical_or(mx::greater(others, mine), mx::logical_and(mx::equal(others, mine), earlier));
  return mx::less(mx::sum(mx::astype(ahead, mx::int32), -1), mx::array(count));
}

std::vector<BitField> patch_layout(int dim) {
  return {{1, 16}, {dim, 4}};
}

std::vector<mx::array> quantise_patch(const mx::array& rest) {
  const auto centre = number(RotatedPqQuantizer::kPatchCentre);
  const auto bits = half_bits(mx::divide(mx::max(mx::abs(rest), -1, true), centre)), scale = from_half_bits(bits);
  const auto usable = mx::greater(scale, number(0));
  const auto codes = mx::clip(mx::round(mx::add(mx::divide(rest, mx::where(usable, scale, number(1))), centre)), number(0),
                              number(2 * RotatedPqQuantizer::kPatchCentre));
  return {bits, mx::where(usable, codes, number(0))};
}

mx::array look_up_patch(const std::vector<mx::array>& fields) {
  return mx::multiply(from_half_bits(fields[0]),
                      mx::subtract(mx::astype(fields[1], mx::float32), number(RotatedPqQuantizer::kPatchCentre)));
}

}  // namespace veloxquant
