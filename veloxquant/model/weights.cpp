#include "veloxquant/model/weights.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <set>
#include <span>

#include "mlx/ops.h"
#include "veloxquant/core/error.h"
#include "veloxquant/core/hash.h"
#include "veloxquant/core/json.h"
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

void check_finite(std::span<const float> values, const std::string& name, const std::string& path) {
  for (const float value : values)
    if (!std::isfinite(value)) throw_failure("weights", "{}: tensor {}: expected finite values, got {}", path, name, value);
}

bool is_aligned_float32(const SafetensorsEntry& entry) {
  return entry.dtype == "F32" && reinterpret_cast<std::uintptr_t>(entry.data.data()) % alignof(float) == 0;
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
  check_finite(tensor.values, name, source->path);
  return mx::array(tensor.values.data(), shape);
}

Matrix Weights::take_matrix(const std::string& module, int rows, int columns, const std::optional<PackingConfig>& packing,
                            int count) {
  const int all_rows = std::max(count, 1) * rows;
  const auto shape = [&](int last) { return count > 0 ? mx::Shape{count, rows, last} : mx::Shape{rows, last}; };
  const auto flat = [&](const mx::array& x) { return mx::reshape(x, {all_rows, x.shape(-1)}); };
  const std::string name = module + ".weight";
  if (has(module + ".scales")) {
    if (!packing)
      throw_failure("weights", "{}: {}.scales is there, but config.json has no \"quantization\" that says how {} is packed",
                    source_, module, name);
    const int groups = columns / packing->group_size;
    if (columns % packing->group_size != 0 || columns * packing->bits % 32 != 0)
      throw_failure("weights", "{}: {}: {} columns are no whole groups of {} at {} bits", source_, name, columns,
                    packing->group_size, packing->bits);
    const bool affine = packing->mode == "affine";
    PackedMatrix packed{flat(take_packed(name, shape(columns * packing->bits / 32), "U32")),
                        flat(take_packed(module + ".scales", shape(groups), affine ? "F32 F16 BF16" : "U8")), std::nullopt,
                        *packing};
    if (affine) packed.biases = flat(take_packed(module + ".biases", shape(groups), "F32 F16 BF16"));
    if (!own_kernels() || !mismatches_.empty()) return Matrix(packed);
    auto values = mx::contiguous(restored(packed));
    values.eval();  // so that what is packed goes
    return Matrix(values);
  }
  const auto found = find(name, shape(columns));
  if (!found) return Matrix(mx::zeros({all_rows, columns}));
  const Source& source = *found;
  if (is_aligned_float32(source.entry)) {
    const auto* data = reinterpret_cast<const float*>(source.entry.data.data());
    check_finite({data, source.entry.data.size() / sizeof(float)}, name, source.path);
    return {source.owner, data, all_rows, columns};
  }
  if (!own_kernels()) {
    const auto values = flat(as_stored(source, shape(columns), name));
    if (!mx::all(mx::isfinite(values)).item<bool>())
      throw_failure("weights", "{}: tensor {}: expected finite values", source.path, name);
    return Matrix(values);
  }
  const auto tensor = std::make_shared<const Tensor>(to_float32(source.entry, name, source.path));
  check_finite(tensor->values, name, source.path);
  return {tensor, tensor->values.data(), all_rows, columns};
}

mx::array Weights::take_packed(const std::string& name, const mx::Shape& shape, std::string_view dtypes) {
  const auto found = find(name, shape);
  if (!found) return mx::zeros(shape);
  const Source& source = *found;
  if (dtypes.find(source.entry.dtype) == std::string_view::npos)
    throw_failure("weights", "{}: tensor {}: expected one of {}, got {}", source.path, name, dtypes, source.entry.dtype);
  const auto values = as_stored(source, shape, name);
  if (mx::issubdtype(values.dtype(), mx::floating) && !mx::all(mx::isfinite(values)).item<bool>())
    throw_failure("weights", "{}: tensor {}: expected finite values", source.path, name);
  return values;
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
