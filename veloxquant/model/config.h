// What config.json of a Hugging Face model folder says.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace veloxquant {

/// Rotary position embedding (RoFormer, arXiv 2104.09864): dimension pair i turns by position / wavelength[i].
struct RopeConfig {
  enum class Scaling { kNone, kLinear, kLlama3 };

  double theta = 10000.0;
  Scaling scaling = Scaling::kNone;
  double factor = 1.0;
  double low_freq_factor = 1.0;  // llama3 only, as the next two
  double high_freq_factor = 4.0;
  int original_max_position_embeddings = 8192;
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
  RopeConfig rope;

  // What the family sets.
  bool query_key_value_bias = false;
  bool attention_output_bias = false;
  bool mlp_bias = false;
  bool query_key_norm = false;  // RMSNorm over each head of queries and keys, before RoPE
};

/// Reads `folder`/config.json.  Throws std::runtime_error that names file, field, value and what is accepted; a model type,
/// activation, RoPE scaling or attention pattern that is not supported is refused by name.
ModelConfig read_config(const std::filesystem::path& folder);

}  // namespace veloxquant
