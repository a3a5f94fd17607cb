// Safetensors files: u64 header length (little-endian), JSON header, data.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "veloxquant/core/file.h"
#include "veloxquant/core/tensor.h"

namespace veloxquant {

struct SafetensorsEntry {
  std::string dtype;  // "F32", "BF16", …
  std::vector<std::int64_t> shape;
  std::span<const std::byte> data;  // row-major, little-endian; not aligned
};

/// A file mapped into memory and checked throughout: sizes, types, and that the tensors cover the data exactly, without holes or
/// overlaps.  What is wrong is a std::runtime_error that names file and tensor.
class SafetensorsFile {
 public:
  explicit SafetensorsFile(const std::filesystem::path& path);

  const std::map<std::string, SafetensorsEntry>& tensors() const { return tensors_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

 private:
  MappedFile file_;
  std::map<std::string, SafetensorsEntry> tensors_;
  std::map<std::string, std::string> metadata_;
};

/// An F32, F16 or BF16 entry as float32; other types are a std::runtime_error that names `tensor` and `source`.  Values are not
/// checked.
Tensor to_float32(const SafetensorsEntry& entry, std::string_view tensor, std::string_view source);

/// The bytes of a file with these entries, in order of name, and metadata: the same for the same content.  The data starts at a
/// multiple of 64 bytes.  Throws std::invalid_argument for a type that files do not have, a shape that does not fit its data and
/// text that is not UTF-8.
std::string serialize_entries(const std::map<std::string, SafetensorsEntry>& entries,
                              const std::map<std::string, std::string>& metadata);

/// The same of tensors, as F32.
std::string serialize_safetensors(const std::map<std::string, Tensor>& tensors, const std::map<std::string, std::string>& metadata);

/// Write these atomically.
void write_entries(const std::filesystem::path& path, const std::map<std::string, SafetensorsEntry>& entries,
                   const std::map<std::string, std::string>& metadata);
void write_safetensors(const std::filesystem::path& path, const std::map<std::string, Tensor>& tensors,
                       const std::map<std::string, std::string>& metadata);

}  // namespace veloxquant
