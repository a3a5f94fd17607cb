#include "veloxquant/model/config.h"

#include <fmt/ranges.h>

#include <algorithm>

#include "veloxquant/core/error.h"
#include "veloxquant/core/file.h"
#include "veloxquant/core/hash.h"
#include "veloxquant/core/json.h"
#include "veloxquant/model/families/families.h"

namespace veloxquant {
namespace {

// Far above any model there is; keeps products of sizes far below 2^63.
constexpr std::int64_t kMaxSize = 1 << 24;
constexpr std::int64_t kMaxLayers = 4096;
constexpr std::int64_t kMaxHeadDim = 1 << 16;

constexpr std::size_t kMaxConfigBytes = 16 << 20;

int size(const JsonObject& json, std::string_view field, std::int64_t max = kMaxSize) {
  return static_cast<int>(json.integer(field, 1, max));
}

const Family& family_of(const JsonObject& json) {
  const std::string model_type = json.string("model_type");
  std::vector<std::string_view> names;
  for (const auto& family : families()) {
    if (family.model_type == model_type) return family;
    names.push_back(family.model_type);
  }
  json.refuse("model_type", fmt::format("one of {}", fmt::join(names, ", ")));
}

// transformers before 5: rope_theta and rope_scaling at the top; since then both in rope_parameters.
RopeConfig read_rope(const JsonObject& json) {
  RopeConfig rope;
  rope.theta = json.number_or("rope_theta", rope.theta, 1e-3, 1e12);
  const char* field = json.has("rope_parameters") ? "rope_parameters" : "rope_scaling";
  if (!json.has(field)) return rope;
  const JsonObject scaling = json.object(field);
  rope.theta = scaling.number_or("rope_theta", rope.theta, 1e-3, 1e12);
  const char* type_field = scaling.has("rope_type") ? "rope_type" : "type";
  const std::string type = scaling.string_or(type_field, "default");
  if (type == "default") return rope;
  if (type != "linear" && type != "llama3") scaling.refuse(type_field, "\"default\", \"linear\" or \"llama3\"");
  rope.factor = scaling.number("factor", 1e-3, 1e6);
  rope.scaling = RopeConfig::Scaling::kLinear;
  if (type == "llama3") {
    rope.scaling = RopeConfig::Scaling::kLlama3;
    rope.low_freq_factor = scaling.number_or("low_freq_factor", rope.low_freq_factor, 1e-6, 1e6);
    rope.high_freq_factor = scaling.number_or("high_freq_factor", rope.high_freq_factor, 1e-6, 1e6);
    if (rope.high_freq_factor <= rope.low_freq_factor) scaling.refuse("high_freq_factor", "more than low_freq_factor");
    rope.original_max_position_embeddings = static_cast<int>(
        scaling.integer_or("original_max_position_embeddings", rope.original_max_position_embeddings, 1, kMaxSize));
  }
  return rope;
}

// A list of ids (several ends of text) counts by its first.
std::optional<int> read_token(const JsonObject& json, std::string_view field, int vocab_size) {
  if (!json.has(field)) return std::nullopt;
  const auto& value = json.at(field);
  if (value.is_array()) {
    if (value.empty() || !value[0].is_number_integer()) json.refuse(field, "a token or a list of tokens");
    const auto first = value[0].get<std::int64_t>();
    if (first < 0 || first >= vocab_size) json.refuse(field, fmt::format("tokens from 0 to {}", vocab_size - 1));
    return static_cast<int>(first);
  }
  return static_cast<int>(json.integer(field, 0, vocab_size - 1));
}

void refuse_unsupported(const JsonObject& json) {
  if (json.string_or("hidden_act", "silu") != "silu") json.refuse("hidden_act", "\"silu\"");
  if (json.number_or("partial_rotary_factor", 1.0, 0.0, 1.0) != 1.0) json.refuse("partial_rotary_factor", "1");
  if (json.has("quantization")) json.refuse("quantization", "none: weights in F32, F16 or BF16");
  if (json.has("quantization_config")) json.refuse("quantization_config", "none: weights in F32, F16 or BF16");
  if (!json.has("layer_types")) return;
  const auto& types = json.at("layer_types");
  if (!types.is_array()) json.refuse("layer_types", "a list");
  for (const auto& type : types)
    if (type != "full_attention") json.refuse("layer_types", "only \"full_attention\"");
}

void read_heads(const JsonObject& json, ModelConfig& config) {
  config.num_heads = size(json, "num_attention_heads");
  config.num_kv_heads = static_cast<int>(json.integer_or("num_key_value_heads", config.num_heads, 1, kMaxSize));
  if (config.num_heads % config.num_kv_heads != 0)
    json.refuse("num_key_value_heads", fmt::format("a divisor of num_attention_heads, {}", config.num_heads));
  if (!json.has("head_dim") && config.hidden_size % config.num_heads != 0)
    json.refuse("num_attention_heads", fmt::format("a divisor of hidden_size, {}", config.hidden_size));
  const std::int64_t most = std::min(kMaxHeadDim, kMaxSize / config.num_heads);  // so that all heads together have a size too
  config.head_dim = static_cast<int>(json.integer_or("head_dim", config.hidden_size / config.num_heads, 1, most));
  if (config.head_dim % 2 != 0)
    throw_failure("config", "{}: head_dim: expected an even number, since RoPE turns pairs, got {}", json.where(), config.head_dim);
}

}  // namespace

ModelConfig read_config(const std::filesystem::path& folder) {
  if (!std::filesystem::is_directory(folder))
    throw_failure("model", "{}: not a folder; expected one with config.json and safetensors", folder.string());
  const auto path = folder / "config.json";
  const std::string text = read_file(path, kMaxConfigBytes);
  const auto document = parse_json(text, path.string());
  const JsonObject json(document, path.string());

  ModelConfig config;
  const Family& family = family_of(json);
  config.model_type = family.model_type;
  config.hash = sha256(text);
  config.num_layers = size(json, "num_hidden_layers", kMaxLayers);
  config.hidden_size = size(json, "hidden_size");
  config.intermediate_size = size(json, "intermediate_size");
  config.vocab_size = size(json, "vocab_size");
  config.max_position_embeddings = static_cast<int>(json.integer_or("max_position_embeddings", 2048, 1, 1 << 30));
  config.rms_norm_eps = json.number_or("rms_norm_eps", config.rms_norm_eps, 0.0, 1.0);
  if (json.has("tie_word_embeddings")) config.tie_word_embeddings = json.boolean("tie_word_embeddings");
  read_heads(json, config);
  config.bos_token_id = read_token(json, "bos_token_id", config.vocab_size);
  config.eos_token_id = read_token(json, "eos_token_id", config.vocab_size);
  config.rope = read_rope(json);
  refuse_unsupported(json);
  family.configure(json, config);
  return config;
}

}  // namespace veloxquant
