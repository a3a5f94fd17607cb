#include "veloxquant/model/weights.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "veloxquant/core/error.h"
#include "veloxquant/core/hash.h"
#include "veloxquant/core/json.h"

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
  std::sort(files.begin(), files.end());
  if (files.empty()) throw_failure("weights", "{}: no *.safetensors here", folder.string());
  return files;
}

std::string shape_text(const auto& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

}  // namespace

Weights::Weights(const fs::path& folder) : folder_(folder) {
  const auto paths = weight_files(folder);
  files_.reserve(paths.size());  // tensors_ points into the files
  for (const auto& path : paths) add_file(path);
  std::string headers;
  for (const auto& [name, source] : tensors_)
    headers += fmt::format("{} {} {}\n", name, source.entry->dtype, shape_text(source.entry->shape));
  headers_hash_ = sha256(headers);
}

void Weights::add_file(const fs::path& path) {
  files_.emplace_back(path);
  for (const auto& [name, entry] : files_.back().tensors()) {
    const auto [at, added] = tensors_.emplace(name, Source{&entry, path.string()});
    if (!added) throw_failure("weights", "{}: tensor {} is also in {}", path.string(), name, at->second.file);
  }
}

mx::array Weights::take(const std::string& name, const mx::Shape& shape) {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) throw_failure("weights", "{}: no tensor {} {}", folder_.string(), name, shape_text(shape));
  const Source source = found->second;
  if (!std::equal(shape.begin(), shape.end(), source.entry->shape.begin(), source.entry->shape.end()))
    throw_failure("weights", "{}: tensor {}: expected shape {} by config.json, got {}", source.file, name, shape_text(shape),
                  shape_text(source.entry->shape));
  tensors_.erase(found);

  const Tensor tensor = to_float32(*source.entry, name, source.file);
  for (const float value : tensor.values)
    if (!std::isfinite(value)) throw_failure("weights", "{}: tensor {}: expected finite values, got {}", source.file, name, value);
  return mx::array(tensor.values.data(), shape);
}

void Weights::expect_all_taken() const {
  if (tensors_.empty()) return;
  std::vector<std::string> names;
  for (const auto& [name, source] : tensors_) {
    if (names.size() == 3) break;
    names.push_back(name);
  }
  throw_failure("weights", "{}: {} tensors that this architecture does not have: {}{}", folder_.string(), tensors_.size(),
                fmt::join(names, ", "), tensors_.size() > names.size() ? ", …" : "");
}

}  // namespace veloxquant
