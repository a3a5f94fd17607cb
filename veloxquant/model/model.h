// A causal language model, one layer at a time.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "mlx/array.h"
#include "veloxquant/model/attention_cache.h"
#include "veloxquant/model/config.h"
#include "veloxquant/model/device.h"
#include "veloxquant/model/ops.h"
#include "veloxquant/plan/model_identity.h"

namespace veloxquant {

class Weights;

/// A decoder-only transformer with pre-norm blocks, grouped-query attention with RoPE and a gated MLP or a mixture of them, in
/// float32; on a GPU weights stay as they are stored, and products of a few rows are made in their precision.  The families
/// (families/) are variations of it.  Layers are called one by one, since calibration walks layer by layer over all samples.
///
/// A model is immutable and runs on MLX's default device at the time of the call (DeviceScope).
class Model {
 public:
  /// Reads config.json and the safetensors files of `folder`.  Throws std::runtime_error that names file, field or tensor.
  static Model load(const std::filesystem::path& folder);

  /// A model in memory: config.json's text, and the tensors that mlx_lm's model has, by its names.  Not copied where they are
  /// float32 and on a CPU, nor on a GPU.  `source` stands for the folder in messages.  Throws likewise.
  static Model from_arrays(std::string_view config_json, const std::map<std::string, mx::array>& arrays, const std::string& source);

  Model(Model&&) noexcept;
  ~Model();

  const ModelConfig& config() const { return config_; }

  /// What plans record of the model they were made for.
  const ModelIdentity& identity() const { return identity_; }

  /// tokens [B, T] int32 in [0, vocab_size) → hidden states [B, T, hidden_size].
  mx::array embed(const mx::array& tokens) const;

  /// hidden states [B, T, hidden_size] through layer `index`, whose keys and values go to `cache` → the same shape.
  mx::array layer(int index, const mx::array& hidden, AttentionCache& cache) const;

  /// hidden states [..., hidden_size] after the last layer → logits [..., vocab_size].
  mx::array logits(const mx::array& hidden) const;

  /// Rows of hidden states whose logits take a moderate amount of memory.
  int logit_rows() const;

  /// What a loss gains by `hidden` when it gains `gradient` by logits(hidden): [..., vocab_size] → [..., hidden_size].
  mx::array hidden_gradient(const mx::array& hidden, const mx::array& gradient) const;

  /// All of it but the head: tokens [B, T] → hidden states [B, T, hidden_size]; caches: one per layer.
  mx::array forward(const mx::array& tokens, const AttentionCaches& caches) const;

  /// One cache per layer.
  AttentionCaches make_caches(const CacheFactory& factory) const;

 private:
  struct Layer;
  class Reader;

  Model(ModelConfig config, Weights weights);

  static Layer read_layer(Reader& reader, const ModelConfig& config, int index);
  mx::array normed(const mx::array& x, const mx::array& weight) const;
  mx::array attention(int index, const mx::array& x, AttentionCache& cache) const;

  ModelConfig config_;
  ModelIdentity identity_;
  std::vector<Rope> ropes_;
  std::vector<Layer> layers_;
  std::optional<Matrix> embedding_;
  std::optional<mx::array> final_norm_;
  Linear head_;
};

}  // namespace veloxquant
