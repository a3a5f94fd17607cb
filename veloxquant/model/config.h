// What config.json of a Hugging Face model folder says.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "veloxquant/kernels/gate.h"

namespace veloxquant {

/// Rotary position embedding (RoFormer, arXiv 2104.09864): dimension pair i turns by position / wavelength[i].
struct RopeConfig {
  enum class Scaling { kNone, kLinear, kLlama3, kYarn, kLongRope };

  double theta = 10000.0;
  Scaling scaling = Scaling::kNone;
  double factor = 1.0;           // linear, llama3, yarn
  double low_freq_factor = 1.0;  // llama3
  double high_freq_factor = 4.0;
  double beta_fast = 32.0, beta_slow = 1.0;  // yarn
  std::vector<double> factors;               // longrope: of each pair
  int original_max_position_embeddings = 0;  // llama3, yarn
  double magnitude = 1.0;                    // what is turned is multiplied by it (yarn, longrope)
  std::optional<int> dims = std::nullopt;    // of a head's, the first ones: even; none: all of them.  0: no position is told
};

/// Of one layer.
struct LayerConfig {
  int sliding_window = 0;  // n > 0: a query sees only the last n tokens up to itself
  int rope = 0;            // which of ModelConfig::ropes
  bool experts = false;    // a mixture of experts (ExpertsConfig) in place of the one MLP
};

/// Mixture of experts (arXiv 1701.06538): the `per_token` experts of largest softmax weight add up.
struct ExpertsConfig {
  int count = 0, per_token = 0, intermediate_size = 0;
  bool normalized = true;      // the weights of the chosen ones sum to one
  std::string block = "mlp.";  // how checkpoints name their tensors in a layer
  std::string gate = "gate_proj", up = "up_proj", down = "down_proj";
};

/// How mlx_lm packed a matrix (mx::quantize): groups of group_size elements of a row.
struct PackingConfig {
  std::string mode = "affine";
  int group_size = 64, bits = 4;

  bool operator==(const PackingConfig&) const = default;
};

struct ModelConfig {
  std::string model_type;
  int num_layers = 0;
  int hidden_size = 0;
  int intermediate_size = 0;
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int vocab_size = 0;
  int max_position_embeddings = 0;
  double rms_norm_eps = 1e-6;
  std::string hash;                         // SHA-256, in hex, of the file
  std::optional<bool> tie_word_embeddings;  // absent: tied where the weights hold no output head
  std::optional<int> bos_token_id, eos_token_id;
  std::vector<RopeConfig> ropes;    // at least one
  std::vector<LayerConfig> layers;  // num_layers
  Activation activation = Activation::kSilu;
  std::optional<PackingConfig> packing;                          // of all matrices that are packed …
  std::map<std::string, std::optional<PackingConfig>> packings;  // … but for these, by module; none: not packed

  // What the family sets.
  bool query_key_value_bias = false;
  bool attention_output_bias = false;
  bool mlp_bias = false;
  bool query_key_norm = false;      // RMSNorm over each head of queries and keys, before RoPE
  bool joined_projections = false;  // queries, keys and values are one tensor, gate and up another
  bool norms_after = false;         // RMSNorm also over what attention and MLP give, before it is added
  double norm_offset = 0.0;         // added to the weights of every RMSNorm
  double attention_scale = 0.0;     // of q·k; 1/√head_dim where the family says nothing
  double attention_soft_cap = 0.0;  // c > 0: a score s becomes c·tanh(s / c)
  double logit_soft_cap = 0.0;
  double embedding_scale = 1.0, residual_scale = 1.0, logit_scale = 1.0;
  ExpertsConfig experts;
};

/// Layers whose keys and values a plan stores: all, or without `sliding` those whose queries see every token.
std::vector<int> stored_layers(const ModelConfig& config, bool sliding);

/// Reads `folder`/config.json.  Throws std::runtime_error that names file, field, value and what is accepted; a model type,
/// activation, RoPE scaling, kind of layer or packing that is not supported is refused by name.
ModelConfig read_config(const std::filesystem::path& folder);

/// Tokens that end a text: eos_token_id, one or a list, of config.json and of generation_config.json where there is one.
std::vector<std::int32_t> read_stop_tokens(const std::filesystem::path& folder, const ModelConfig& config);

/// The text of such a file; `source` stands for its name in messages.  Throws likewise.
ModelConfig parse_config(std::string_view json, const std::string& source);

}  // namespace veloxquant
