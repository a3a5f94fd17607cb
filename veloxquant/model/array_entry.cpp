#include "veloxquant/model/array_entry.h"

#include <fmt/ostream.h>
#include <fmt/ranges.h>

#include <limits>
#include <map>

#include "mlx/ops.h"
#include "mlx/utils.h"
#include "veloxquant/core/error.h"

namespace veloxquant {
namespace {

const std::map<std::string, mx::Dtype> kTypes = {{"F32", mx::float32}, {"F16", mx::float16}, {"BF16", mx::bfloat16},
                                                 {"U32", mx::uint32},  {"I32", mx::int32},   {"U8", mx::uint8}};

std::string type_name(mx::Dtype type) {
  for (const auto& [name, known] : kTypes)
    if (known == type) return name;
  return fmt::format("{}", fmt::streamed(type));
}

}  // namespace

mx::array on_cpu(const mx::array& array) {
  auto held = mx::contiguous(array, /* allow_col_major= */ false, mx::Device::cpu);
  held.eval();
  return held;
}

mx::array array_of_zeros(const mx::Shape& shape, mx::Dtype type) {
  auto zeros = mx::zeros(shape, type, mx::Device::cpu);
  zeros.eval();
  return zeros;
}

SafetensorsEntry as_entry(const mx::array& array) {
  return {type_name(array.dtype()), {array.shape().begin(), array.shape().end()}, {array.data<std::byte>(), array.nbytes()}};
}

mx::array as_array(const SafetensorsEntry& entry, const std::string& tensor, const std::string& source) {
  const auto type = kTypes.find(entry.dtype);
  if (type == kTypes.end())
    throw_failure("safetensors", "{}: tensor {}: expected F32, F16, BF16, U32, I32 or U8, got {}", source, tensor, entry.dtype);
  mx::Shape shape;
  for (const auto size : entry.shape) {
    if (size > std::numeric_limits<int>::max())
      throw_failure("safetensors", "{}: tensor {}: expected sizes below 2^31, got {}", source, tensor, size);
    shape.push_back(static_cast<int>(size));
  }
  if (entry.data.empty()) return mx::zeros(shape, type->second);
  auto bytes = shape.empty() ? mx::Shape{1} : shape;
  bytes.back() *= static_cast<int>(mx::size_of(type->second));
  const auto* data = reinterpret_cast<const std::uint8_t*>(entry.data.data());
  return mx::reshape(mx::view(mx::array(data, bytes, mx::uint8), type->second), shape);
}

}  // namespace veloxquant
