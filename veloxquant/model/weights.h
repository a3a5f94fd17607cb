// The tensors of a model folder.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "mlx/array.h"
#include "veloxquant/core/safetensors.h"
#include "veloxquant/model/matrix.h"

namespace veloxquant {

/// Where the tensors of a model are: in memory, or in the safetensors files of a Hugging Face model folder: those that
/// model.safetensors.index.json names, or else every model*.safetensors, or where there is none every *.safetensors.  Tensors are
/// taken by name.  One that is missing or of another shape is noted, and expect_all_taken() throws for all of these and for what
/// nobody took, so that a checkpoint of another architecture is never half read.
class Weights {
 public:
  /// Throws std::runtime_error that names file and tensor.
  explicit Weights(const std::filesystem::path& folder);

  /// Arrays in memory, by the same names; `source` stands for the folder in messages.
  Weights(const std::map<std::string, mx::array>& arrays, std::string source);

  bool has(const std::string& name) const { return tensors_.contains(name); }

  /// The tensor in float32.  Throws unless it is F32, F16 or BF16, and finite everywhere.
  mx::array take(const std::string& name, const mx::Shape& shape);

  /// Whether there is a matrix `module`.weight.
  bool has_matrix(const std::string& module) const { return has(module + ".weight"); }

  /// The matrix `module`.weight [rows, columns] by the same rules, left in the precision in which it is stored, and on the CPU
  /// where it lies.  Where there is `module`.scales it is packed as `packing` says (`module`.biases too). count > 0: [count, rows,
  /// columns], one after another.
  Matrix take_matrix(const std::string& module, int rows, int columns, const std::optional<PackingConfig>& packing, int count = 0);

  /// Says that a tensor is known but not needed; one that is not there is fine.
  void skip(const std::string& name) { tensors_.erase(name); }

  /// Throws, naming them (the first of each kind), if tensors were missing, had other shapes, or are left.
  void expect_all_taken() const;

  /// SHA-256, in hex, over names, types and shapes of all tensors.
  const std::string& headers_hash() const { return headers_hash_; }

 private:
  struct Source {
    std::shared_ptr<const void> owner;  // of the entry's data
    SafetensorsEntry entry;
    std::string path;
    std::optional<mx::array> array;  // of which the data are the elements, where it came as one
  };

  void add_file(const std::filesystem::path& path);
  void hash_headers();
  static mx::array as_stored(const Source& source, const mx::Shape& shape, const std::string& name);
  std::optional<Source> find(const std::string& name, const mx::Shape& shape);
  std::optional<Source> find_packed(const std::string& name, const mx::Shape& shape, std::string_view dtypes);
  Matrix take_packed_matrix(const std::string& module, int rows, int columns, const PackingConfig& packing, int count);

  std::map<std::string, Source> tensors_;
  std::vector<std::string> mismatches_;
  std::string headers_hash_;
  std::string source_;
};

}  // namespace veloxquant
