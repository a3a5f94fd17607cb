// What quantizers share: checks of what they are made from, rows to train on.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <span>
#include <string_view>
#include <vector>

#include "veloxquant/quantize/registry.h"

namespace veloxquant {

/// Throws std::invalid_argument unless the parameters hold exactly these numbers, tensors and tensors of bytes.
void expect_parameters(const QuantizerParameters& parameters, std::initializer_list<std::string_view> numbers,
                       std::initializer_list<std::string_view> tensors, std::initializer_list<std::string_view> byte_tensors = {});

/// A number in [min, max]; throws std::invalid_argument that names it.
std::int64_t number_in(const QuantizerParameters& parameters, std::string_view name, std::int64_t min, std::int64_t max);

/// A tensor of this shape with finite values; throws std::invalid_argument that names it.
const Tensor& tensor_of(const QuantizerParameters& parameters, std::string_view name, const std::vector<std::int64_t>& shape);
const ByteTensor& byte_tensor_of(const QuantizerParameters& parameters, std::string_view name,
                                 const std::vector<std::int64_t>& shape);

/// `width` as a whole number of bits that the method offers for this dim; throws std::invalid_argument that lists the widths, or
/// says which dims the method offers any for.
int whole_bits(std::string_view method, int dim, double width);

/// Throws std::invalid_argument unless vectors are whole rows of dim finite values.
void check_vectors(std::string_view method, std::span<const float> vectors, int dim);

/// At most `most` rows of vectors [rows, dim], one drawn from each stretch of the data.
std::vector<float> spread_rows(std::span<const float> vectors, int dim, std::size_t most, std::uint64_t seed);

}  // namespace veloxquant
