// The tensors of a model folder.
#pragma once

#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "mlx/array.h"
#include "veloxquant/core/safetensors.h"

namespace veloxquant {

namespace mx = mlx::core;

/// The safetensors files of a Hugging Face model folder: those that model.safetensors.index.json names, or else every
/// *.safetensors.  Tensors are taken by name; what nobody takes is an error, so that a checkpoint of another architecture is
/// never half read.
class Weights {
 public:
  /// Throws std::runtime_error that names file and tensor.
  explicit Weights(const std::filesystem::path& folder);

  bool has(const std::string& name) const { return tensors_.contains(name); }

  /// The tensor in float32.  Throws unless it is there, F32, F16 or BF16, of `shape`, and finite everywhere.
  mx::array take(const std::string& name, const mx::Shape& shape);

  /// Says that a tensor is known but not needed; one that is not there is fine.
  void skip(const std::string& name) { tensors_.erase(name); }

  /// Throws, naming the first ones, if tensors are left.
  void expect_all_taken() const;

  /// SHA-256, in hex, over names, types and shapes of all tensors.
  const std::string& headers_hash() const { return headers_hash_; }

 private:
  void add_file(const std::filesystem::path& path);

  struct Source {
    const SafetensorsEntry* entry;
    std::string file;
  };

  std::vector<SafetensorsFile> files_;
  std::map<std::string, Source> tensors_;
  std::string headers_hash_;
  std::filesystem::path folder_;
};

}  // namespace veloxquant
