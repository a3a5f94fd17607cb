#include "veloxquant/quantize/parameters.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>

#include "veloxquant/core/error.h"
#include "veloxquant/core/random.h"

namespace veloxquant {
namespace {

template <class Map>
void expect_keys(const QuantizerParameters& parameters, const Map& map, std::initializer_list<std::string_view> names,
                 const char* kind) {
  for (const auto name : names)
    if (!map.contains(std::string(name))) throw_invalid(parameters.method, "no {} {}", kind, name);
  for (const auto& [name, value] : map)
    if (std::find(names.begin(), names.end(), name) == names.end()) throw_invalid(parameters.method, "unknown {} {}", kind, name);
}

}  // namespace

void expect_parameters(const QuantizerParameters& parameters, std::initializer_list<std::string_view> numbers,
                       std::initializer_list<std::string_view> tensors, std::initializer_list<std::string_view> byte_tensors) {
  if (parameters.dim < 1 || parameters.dim > 65536)
    throw_invalid(parameters.method, "dim: expected 1 to 65536, got {}", parameters.dim);
  expect_keys(parameters, parameters.numbers, numbers, "number");
  expect_keys(parameters, parameters.tensors, tensors, "tensor");
  expect_keys(parameters, parameters.byte_tensors, byte_tensors, "tensor of bytes");
}

std::int64_t number_in(const QuantizerParameters& parameters, std::string_view name, std::int64_t min, std::int64_t max) {
  const std::int64_t value = parameters.numbers.at(std::string(name));
  if (value < min || value > max) throw_invalid(parameters.method, "{}: expected {} to {}, got {}", name, min, max, value);
  return value;
}

namespace {

template <class AnyTensor>
void check_shape(const QuantizerParameters& parameters, std::string_view name, const std::vector<std::int64_t>& shape,
                 const AnyTensor& tensor) {
  if (tensor.shape != shape)
    throw_invalid(parameters.method, "{}: expected shape [{}], got [{}]", name, fmt::join(shape, ", "),
                  fmt::join(tensor.shape, ", "));
  std::size_t size = 1;
  for (const auto axis : shape) size *= static_cast<std::size_t>(axis);
  if (tensor.values.size() != size)
    throw_invalid(parameters.method, "{}: expected {} values, got {}", name, size, tensor.values.size());
}

}  // namespace

const Tensor& tensor_of(const QuantizerParameters& parameters, std::string_view name, const std::vector<std::int64_t>& shape) {
  const Tensor& tensor = parameters.tensors.at(std::string(name));
  check_shape(parameters, name, shape, tensor);
  for (const float value : tensor.values)
    if (!std::isfinite(value)) throw_invalid(parameters.method, "{}: expected finite values, got {}", name, value);
  return tensor;
}

const ByteTensor& byte_tensor_of(const QuantizerParameters& parameters, std::string_view name,
                                 const std::vector<std::int64_t>& shape) {
  const ByteTensor& tensor = parameters.byte_tensors.at(std::string(name));
  check_shape(parameters, name, shape, tensor);
  return tensor;
}

int whole_bits(std::string_view method, int dim, double width) {
  check_dim(quantizer_method(method), dim);
  const auto widths = quantizer_method(method).widths(dim);
  if (std::find(widths.begin(), widths.end(), width) == widths.end())
    throw_invalid(method, "expected a width of {} bits, got {}", fmt::join(widths, ", "), width);
  return static_cast<int>(width);
}

void check_vectors(std::string_view method, std::span<const float> vectors, int dim) {
  if (dim < 1 || vectors.size() % static_cast<std::size_t>(dim) != 0)
    throw_invalid(method, "expected rows of {} values, got {} values", dim, vectors.size());
  for (const float value : vectors)
    if (!std::isfinite(value)) throw_invalid(method, "expected finite values, got {}", value);
}

std::vector<float> spread_rows(std::span<const float> vectors, int dim, std::size_t most, std::uint64_t seed) {
  const auto width = static_cast<std::size_t>(dim), rows = vectors.size() / width, kept = std::min(rows, most);
  std::vector<float> result;
  result.reserve(kept * width);
  Random random(seed);
  for (std::size_t i = 0; i < kept; ++i) {
    const std::size_t begin = rows * i / kept, end = rows * (i + 1) / kept;
    const auto row = vectors.subspan((begin + random.below(end - begin)) * width, width);
    result.insert(result.end(), row.begin(), row.end());
  }
  return result;
}

}  // namespace veloxquant
