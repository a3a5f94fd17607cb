#include "veloxquant/model/weights.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <set>
#include <span>

#include "mlx/ops.h"
#include "veloxquant/core/error.h"
#include "veloxquant/core/half.h"
#include "veloxquant/core/hash.h"
#include "veloxquant/core/json.h"
#include "veloxquant/core/parallel.h"
#include "veloxquant/model/array_entry.h"
#include "veloxquant/model/cpu_operation.h"

namespace veloxquant {
namespace {

namespace fs = std::filesystem;

std::vector<fs::path> files_of_index(const fs::path& folder, const fs::path& index) {
  const auto document = read_json(index);
  if (!document.is_object() || !document.contains("weight_map") || !document["weight_map"].is_object())
    throw_failure("weights", "{}: expected an object \"weight_map\"", index.string());
  std::set<fs::path> files;
  for (const auto& [tensor, file] : document["weight_map"].items()) {
    if (!file.is_string() || fs::path(file.get<std::string>()).filename() != fs::path(file.get<std::string>()))
      throw_failure("weights", "{}: weight_map.{}: expected a file name, got {}", index.string(), tensor, file.dump());
    files.insert(folder / file.get<std::string>());
  }
  return {files.begin(), files.end()};
}

std::vector<fs::path> weight_files(const fs::path& folder) {
  if (const fs::path index = folder / "model.safetensors.index.json"; fs::exists(index)) return files_of_index(folder, index);
  std::vector<fs::path> files;
  for (const auto& entry : fs::directory_iterator(folder))
    if (entry.path().extension() == ".safetensors") files.push_back(entry.path());
  // Adapters and other forms of the same weights may lie beside them.
  const auto is_model = [](const fs::path& file) { return file.filename().string().starts_with("model"); };
  if (std::any_of(files.begin(), files.end(), is_model)) std::erase_if(files, std::not_fn(is_model));
  std::sort(files.begin(), files.end());
  if (files.empty()) throw_failure("weights", "{}: no *.safetensors here", folder.string());
  return files;
}

[[noreturn]] void refuse_value(const std::string& name, const std::string& path, float value) {
  throw_failure("weights", "{}: tensor {}: expected finite values, got {}", path, name, value);
}

// Elements as bits, of which those of `exponent` are all set where they are no finite number.
template <class Bits, class Number>
void check_finite(std::span<const std::byte> data, Bits exponent, Number number, const std::string& name, const std::string& path) {
  const auto at = [&](std::size_t i) {
    Bits bits;
    std::memcpy(&bits, data.data() + i * sizeof(bits), sizeof(bits));
    return bits;
  };
  constexpr std::size_t kRange = 1 << 18;
  const std::size_t count = data.size() / sizeof(Bits);
  parallel_for(count, kRange, [&](std::size_t begin, std::size_t end) {
    std::size_t wrong = 0;
    for (std::size_t i = begin; i < end; ++i) wrong += (at(i) & exponent) == exponent;
    for (std::size_t i = begin; wrong > 0 && i < end; ++i)
      if ((at(i) & exponent) == exponent) refuse_value(name, path, number(at(i)));
  });
}

// Of floats, and of what mx::quantize writes as bytes: scales of one exponent, codes of E4M3.
void check_finite(const SafetensorsEntry& entry, const std::string& name, const std::string& path) {
  const auto check = [&](auto exponent, auto number) { check_finite(entry.data, exponent, number, name, path); };
  if (entry.dtype == "F32") return check(std::uint32_t{0x7F800000}, [](std::uint32_t bits) { return std::bit_cast<float>(bits); });
  if (entry.dtype == "F16") return check(std::uint16_t{0x7C00}, from_half);
  if (entry.dtype == "BF16") return check(std::uint16_t{0x7F80}, from_bfloat);
  const auto no_number = [](std::uint8_t) { return std::numeric_limits<float>::quiet_NaN(); };
  check(entry.dtype == "U8" ? std::uint8_t{0xFF} : std::uint8_t{0x7F}, no_number);
}

ElementType type_of(const std::string& dtype) {
  return dtype == "F32" ? ElementType::kFloat32 : dtype == "F16" ? ElementType::kFloat16 : ElementType::kBfloat16;
}

// What kernels read: where it lies, if it is aligned to `size` bytes there.
struct Elements {
  std::shared_ptr<const void> owner;
  const std::byte* data;
};

Elements aligned(std::shared_ptr<const void> owner, std::span<const std::byte> data, std::size_t size) {
  if (reinterpret_cast<std::uintptr_t>(data.data()) % size == 0) return {std::move(owner), data.data()};
  const auto copy = std::make_shared<std::vector<std::byte>>(data.begin(), data.end());
  return {copy, copy->data()};
}

std::size_t bytes_of_element(const SafetensorsEntry& entry) {
  return entry.dtype == "F32" ? 4 : entry.dtype == "U8" || entry.dtype == "U32" ? 1 : 2;  // codes are read as bytes
}

std::string shape_text(const auto& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

}  // namespace

Weights::Weights(const fs::path& folder) : source_(folder.string()) {
  for (const auto& path : weight_files(folder)) add_file(path);
  hash_headers();
}

Weights::Weights(const std::map<std::string, mx::array>& arrays, std::string source) : source_(std::move(source)) {
  for (const auto& [name, given] : arrays) {
    const auto array = std::make_shared<mx::array>(mx::contiguous(given));
    array->eval();
    tensors_.emplace(name, Source{array, as_entry(*array), source_, *array});
  }
  hash_headers();
}

void Weights::hash_headers() {
  std::string headers;
  for (const auto& [name, source] : tensors_)
    headers += fmt::format("{} {} {}\n", name, source.entry.dtype, shape_text(source.entry.shape));
  headers_hash_ = sha256(headers);
}

void Weights::add_file(const fs::path& path) {
  const auto file = std::make_shared<const SafetensorsFile>(path);
  for (const auto& [name, entry] : file->tensors()) {
    const auto [at, added] = tensors_.emplace(name, Source{file, entry, path.string(), std::nullopt});
    if (!added) throw_failure("weights", "{}: tensor {} is also in {}", path.string(), name, at->second.path);
  }
}

// In the type in which it is given; a copy of what is in a file.
mx::array Weights::as_stored(const Source& source, const mx::Shape& shape, const std::string& name) {
  if (source.array) return mx::reshape(*source.array, shape);
  return as_array(source.entry, name, source.path);
}

std::optional<Weights::Source> Weights::find(const std::string& name, const mx::Shape& shape) {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) {
    mismatches_.push_back(fmt::format("no tensor {} {}", name, shape_text(shape)));
    return std::nullopt;
  }
  Source source = found->second;
  tensors_.erase(found);
  if (std::equal(shape.begin(), shape.end(), source.entry.shape.begin(), source.entry.shape.end())) return source;
  mismatches_.push_back(
      fmt::format("tensor {}: expected shape {} by config.json, got {}", name, shape_text(shape), shape_text(source.entry.shape)));
  return std::nullopt;
}

mx::array Weights::take(const std::string& name, const mx::Shape& shape) {
  const auto source = find(name, shape);
  if (!source) return mx::zeros(shape);
  const Tensor tensor = to_float32(source->entry, name, source->path);
  check_finite(source->entry, name, source->path);
  return mx::array(tensor.values.data(), shape);
}

Matrix Weights::take_matrix(const std::string& module, int rows, int columns, const std::optional<PackingConfig>& packing,
                            int count) {
  const int all_rows = std::max(count, 1) * rows;
  const std::string name = module + ".weight";
  if (has(module + ".scales")) {
    if (!packing)
      throw_failure("weights", "{}: {}.scales is there, but config.json has no \"quantization\" that says how {} is packed",
                    source_, module, name);
    return take_packed_matrix(module, rows, columns, *packing, count);
  }
  const mx::Shape shape = count > 0 ? mx::Shape{count, rows, columns} : mx::Shape{rows, columns};
  const auto source = find(name, shape);
  if (!source) return Matrix(mx::zeros({all_rows, columns}));
  const SafetensorsEntry& entry = source->entry;
  if (entry.dtype != "F32" && entry.dtype != "F16" && entry.dtype != "BF16")
    throw_failure("weights", "{}: tensor {}: expected F32, F16 or BF16, got {}", source->path, name, entry.dtype);
  if (!own_kernels() && entry.dtype != "F32") {
    const auto values = mx::reshape(as_stored(*source, shape, name), {all_rows, columns});
    if (!mx::all(mx::isfinite(values)).item<bool>())
      throw_failure("weights", "{}: tensor {}: expected finite values", source->path, name);
    return Matrix(values);
  }
  check_finite(entry, name, source->path);
  auto elements = aligned(source->owner, entry.data, bytes_of_element(entry));
  return {std::move(elements.owner), StoredMatrix(type_of(entry.dtype), elements.data), all_rows, columns};
}

Matrix Weights::take_packed_matrix(const std::string& module, int rows, int columns, const PackingConfig& packing, int count) {
  const int all_rows = std::max(count, 1) * rows, groups = columns / packing.group_size;
  if (columns % packing.group_size != 0 || columns * packing.bits % 32 != 0)
    throw_failure("weights", "{}: {}.weight: {} columns are no whole groups of {} at {} bits", source_, module, columns,
                  packing.group_size, packing.bits);
  const auto shape = [&](int last) { return count > 0 ? mx::Shape{count, rows, last} : mx::Shape{rows, last}; };
  const bool affine = packing.mode == "affine";
  constexpr std::string_view kFloats = "F32 F16 BF16";
  const std::string names[] = {module + ".weight", module + ".scales", module + ".biases"};
  std::vector<std::optional<Source>> parts = {find_packed(names[0], shape(columns * packing.bits / 32), "U32"),
                                              find_packed(names[1], shape(groups), affine ? kFloats : "U8")};
  if (affine) parts.push_back(find_packed(names[2], shape(groups), kFloats));
  if (!std::all_of(parts.begin(), parts.end(), [](const auto& part) { return part.has_value(); }))
    return Matrix(mx::zeros({all_rows, columns}));
  if (!own_kernels() || (affine && parts[1]->entry.dtype != parts[2]->entry.dtype)) {
    const auto array = [&](std::size_t i) {
      const auto x = as_stored(*parts[i], {parts[i]->entry.shape.begin(), parts[i]->entry.shape.end()}, names[i]);
      return mx::reshape(x, {all_rows, x.shape(-1)});
    };
    const auto finite = [&](std::size_t i) {
      const auto values = array(i);
      if (mx::issubdtype(values.dtype(), mx::floating) && !mx::all(mx::isfinite(values)).item<bool>())
        throw_failure("weights", "{}: tensor {}: expected finite values", parts[i]->path, names[i]);
      return values;
    };
    return Matrix(PackedMatrix{array(0), finite(1), affine ? std::optional(finite(2)) : std::nullopt, packing});
  }
  auto held = std::make_shared<std::vector<Elements>>();
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const SafetensorsEntry& entry = parts[i]->entry;
    if (i > 0 || packing.mode == "mxfp8") check_finite(entry, names[i], parts[i]->path);
    held->push_back(aligned(parts[i]->owner, entry.data, bytes_of_element(entry)));
  }
  StoredMatrix stored;
  stored.type = veloxquant::type_of(packing);
  stored.values = (*held)[0].data;
  stored.bits = packing.bits;
  stored.group_size = static_cast<std::size_t>(packing.group_size);
  stored.scales = (*held)[1].data;
  if (affine) stored.scale_type = type_of(parts[1]->entry.dtype), stored.biases = (*held)[2].data;
  return {std::move(held), stored, all_rows, columns};
}

std::optional<Weights::Source> Weights::find_packed(const std::string& name, const mx::Shape& shape, std::string_view dtypes) {
  auto found = find(name, shape);
  if (found && dtypes.find(found->entry.dtype) == std::string_view::npos)
    throw_failure("weights", "{}: tensor {}: expected one of {}, got {}", found->path, name, dtypes, found->entry.dtype);
  return found;
}

void Weights::expect_all_taken() const {
  constexpr std::size_t kShown = 8;
  std::vector<std::string> problems(mismatches_.begin(),
                                    mismatches_.begin() + static_cast<std::ptrdiff_t>(std::min(kShown, mismatches_.size())));
  if (mismatches_.size() > kShown) problems.push_back(fmt::format("{} more that do not fit", mismatches_.size() - kShown));
  if (!tensors_.empty()) {
    std::vector<std::string> names;
    for (const auto& [name, source] : tensors_)
      if (names.size() < kShown) names.push_back(name);
    problems.push_back(fmt::format("{} tensors that this architecture does not have: {}{}", tensors_.size(), fmt::join(names, ", "),
                                   tensors_.size() > names.size() ? ", …" : ""));
  }
  if (!problems.empty()) throw_failure("weights", "{}: {}", source_, fmt::join(problems, "; "));
}

}  // namespace veloxquant
