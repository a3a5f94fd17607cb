// What the quantizers do with one token, as graphs of MLX's operations, for back ends where our CPU code does not run.
#pragma once

#include <functional>
#include <memory>
#include <string_view>
#include <vector>

#include "mlx/array.h"
#include "veloxquant/model/device.h"
#include "veloxquant/quantize/registry.h"

namespace veloxquant {

/// Whole numbers that stand in a row of bytes: `count` of `bits` bits each, then zeros up to a whole byte.
struct BitField {
  int count, bits;
};

int packed_bytes(const std::vector<BitField>& layout);

/// Numbers [..., count] of each field, of any type → uint8 [..., packed_bytes(layout)], as kernels/bit_packing.h packs them.
mx::array pack_fields(const std::vector<mx::array>& fields, const std::vector<BitField>& layout);

/// Reads them back, as unsigned integers.
std::vector<mx::array> unpack_fields(const mx::array& bytes, const std::vector<BitField>& layout);

/// A float as IEEE half, its bits as a field of 16; what lies beyond ±65504 becomes that.  And back.
mx::array half_bits(const mx::array& x);
mx::array from_half_bits(const mx::array& bits);

/// A method of quantizer_methods() that stores tokens one by one; rotated_pq without its patches.  MLX's own operations are right
/// to float precision: a vector within rounding of a boundary between two codes may get the other one.
struct MethodGraph {
  std::vector<BitField> layout;  // of an encoded token

  /// Vectors [..., dim] → what codes stand for, in a space of the method's own.
  std::function<mx::array(const mx::array& x)> forward;

  /// From there to numbers, one array for each field of the layout, and from those back there.
  std::function<std::vector<mx::array>(const mx::array& z)> quantise;
  std::function<mx::array(const std::vector<mx::array>& fields)> look_up;

  /// Sums Σw·z [..., dim] and Σw [..., 1] → sums of vectors.
  std::function<mx::array(const mx::array& sums, const mx::array& totals)> back;

  /// Vectors [..., dim] ↔ bytes [..., packed_bytes(layout)], those of Quantizer::encode for one token.
  mx::array encode(const mx::array& x) const { return pack_fields(quantise(forward(x)), layout); }
  mx::array decode(const mx::array& bytes) const;
};

/// Throws std::logic_error for a method that has no row in the table of method_graph.cpp.  The quantizer is kept where our kernels
/// run (own_kernels() when this is called), and chooses the codes there.
MethodGraph method_graph(const QuantizerParameters& parameters, const std::shared_ptr<const Quantizer>& quantizer);

/// Which of the errors [..., n] are the `count` largest, the earlier of equal ones: bool [..., n].
mx::array largest(const mx::array& errors, int count);

/// Patches of rotated_pq: what is left of vectors, [..., dim], as numbers (scale, codes), and what is read of them.
std::vector<BitField> patch_layout(int dim);
std::vector<mx::array> quantise_patch(const mx::array& rest);
mx::array look_up_patch(const std::vector<mx::array>& fields);

// For graphs of methods that group in their own way.

/// x [..., length] ↔ [..., groups, size]; the last group is filled up with its last value.
mx::array in_groups(const mx::array& x, int size);
mx::array out_of_groups(const mx::array& groups, int length);

/// The nearest of 2^bits levels, `offset` + `step` · code; 0 where there is no step.
mx::array codes_of(const mx::array& x, const mx::array& offset, const mx::array& step, int bits);

/// x from `begin` to `end` of an axis, −1 the last one.
mx::array part(const mx::array& x, int axis, int begin, int end);

mx::array number(double value);
int bits_of(const QuantizerParameters& parameters);

}  // namespace veloxquant
