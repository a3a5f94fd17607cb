// What calibration and evaluation see of a model.
#pragma once

#include <functional>
#include <vector>

#include "mlx/array.h"
#include "veloxquant/model/attention_cache.h"
#include "veloxquant/model/config.h"
#include "veloxquant/model/device.h"
#include "veloxquant/plan/model_identity.h"

namespace veloxquant {

/// A causal language model, one layer at a time, since calibration walks layer by layer over all samples: `Model`, or somebody
/// else's.  Immutable; runs on MLX's default device at the time of the call (DeviceScope).
class LanguageModel {
 public:
  virtual ~LanguageModel() = default;

  const ModelConfig& config() const { return config_; }

  /// What plans record of the model they were made for.
  const ModelIdentity& identity() const { return identity_; }

  /// tokens [B, T] int32 in [0, vocab_size) → hidden states [B, T, hidden_size].
  virtual mx::array embed(const mx::array& tokens) const = 0;

  /// hidden states [B, T, hidden_size] through layer `index`, whose keys and values go to `cache` → the same shape.
  virtual mx::array layer(int index, const mx::array& hidden, AttentionCache& cache) const = 0;

  /// hidden states [..., hidden_size] after the last layer → logits [..., vocab_size].
  virtual mx::array logits(const mx::array& hidden) const = 0;

  /// Rows of hidden states whose logits take a moderate amount of memory.
  int logit_rows() const;

  /// What a loss gains by `hidden` when it gains `gradient` by logits(hidden): [..., vocab_size] → [..., hidden_size].
  virtual mx::array hidden_gradient(const mx::array& hidden, const mx::array& gradient) const;

  /// All of it but the head: tokens [B, T] → hidden states [B, T, hidden_size]; caches: one per layer.
  mx::array forward(const mx::array& tokens, const AttentionCaches& caches) const;

  /// The same, evaluated layer by layer: the activations of two layers at most are in memory, and `after_layer` is called as each
  /// is done (on a GPU, as the one after it is under way).  What it throws ends the work.
  mx::array forward_by_layers(const mx::array& tokens, const AttentionCaches& caches,
                              const std::function<void()>& after_layer) const;

  /// One cache per layer.
  AttentionCaches make_caches(const CacheFactory& factory) const;

 protected:
  LanguageModel(ModelConfig config, ModelIdentity identity) : config_(std::move(config)), identity_(std::move(identity)) {}
  LanguageModel(LanguageModel&&) = default;

  ModelConfig config_;
  ModelIdentity identity_;
};

}  // namespace veloxquant
