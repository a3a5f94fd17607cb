// The models that the engine runs itself.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "mlx/array.h"
#include "veloxquant/model/language_model.h"
#include "veloxquant/model/ops.h"

namespace veloxquant {

class Weights;

/// A decoder-only transformer with pre-norm blocks, grouped-query attention with RoPE and a gated MLP or a mixture of them, in
/// float32; on a GPU weights stay as they are stored, and products of a few rows are made in their precision.  The families
/// (families/) are variations of it.
class Model : public LanguageModel {
 public:
  /// Reads config.json and the safetensors files of `folder`.  Throws std::runtime_error that names file, field or tensor.
  static Model load(const std::filesystem::path& folder);

  /// A model in memory: config.json's text, and the tensors that mlx_lm's model has, by its names.  Not copied where they are
  /// float32 and on a CPU, nor on a GPU.  `source` stands for the folder in messages.  Throws likewise.
  static Model from_arrays(std::string_view config_json, const std::map<std::string, mx::array>& arrays, const std::string& source);

  Model(Model&&) noexcept;
  ~Model() override;

  mx::array embed(const mx::array& tokens) const override;
  mx::array layer(int index, const mx::array& hidden, AttentionCache& cache) const override;
  mx::array logits(const mx::array& hidden) const override;
  mx::array hidden_gradient(const mx::array& hidden, const mx::array& gradient) const override;

 private:
  struct Layer;
  class Reader;

  Model(ModelConfig config, Weights weights);

  static Layer read_layer(Reader& reader, const ModelConfig& config, int index);
  mx::array normed(const mx::array& x, const mx::array& weight) const;
  mx::array attention(int index, const mx::array& x, AttentionCache& cache) const;

  std::vector<Rope> ropes_;
  std::vector<Layer> layers_;
  std::optional<Matrix> embedding_;
  std::optional<mx::array> final_norm_;
  Linear head_;
};

}  // namespace veloxquant
