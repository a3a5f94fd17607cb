#include "veloxquant/model/config.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <cmath>

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

// Models that keep something else than keys and values of every token are told apart by these fields.
void refuse_other_states(const JsonObject& json) {
  struct Sign {
    const char *field, *what;
  };
  constexpr Sign kSigns[] = {{"kv_lora_rank", "multi-head latent attention (MLA)"},
                             {"ssm_cfg", "state-space layers"},
                             {"state_size", "state-space layers"},
                             {"mamba_d_state", "Mamba layers"},
                             {"mamba_num_heads", "Mamba layers"},
                             {"hybrid_override_pattern", "hybrid layers"},
                             {"linear_num_value_heads", "linear-attention layers"},
                             {"lru_width", "recurrent layers"}};
  for (const auto& [field, what] : kSigns)
    if (json.has(field))
      throw_failure("config", "{}: {}: {} are not supported: expected layers that store keys and values of every token",
                    json.where(), field, what);
  for (const char* field : {"layer_types", "layers_block_type", "block_types"}) {
    if (!json.has(field) || !json.at(field).is_array()) continue;
    const auto& types = json.at(field);
    for (std::size_t i = 0; i < types.size(); ++i)
      if (types[i] != "full_attention" && types[i] != "sliding_attention" && types[i] != "attention")
        throw_failure("config", "{}: {}[{}]: expected \"full_attention\" or \"sliding_attention\", got {}", json.where(), field, i,
                      types[i].dump());
  }
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

// One id, or a list.
std::vector<std::int32_t> read_tokens(const JsonObject& json, std::string_view field, int vocab_size) {
  std::vector<std::int32_t> tokens;
  if (!json.has(field)) return tokens;
  const auto& value = json.at(field);
  const auto add = [&](const nlohmann::json& token) {
    if (!token.is_number_integer()) json.refuse(field, "a token or a list of tokens");
    if (token < 0 || token >= vocab_size) json.refuse(field, fmt::format("tokens from 0 to {}", vocab_size - 1));
    tokens.push_back(token.get<std::int32_t>());
  };
  if (!value.is_array()) return add(value), tokens;
  if (value.empty()) json.refuse(field, "a token or a list of tokens");
  for (const auto& token : value) add(token);
  return tokens;
}

// A list (several ends of text) counts by its first.
std::optional<int> read_token(const JsonObject& json, std::string_view field, int vocab_size) {
  const auto tokens = read_tokens(json, field, vocab_size);
  return tokens.empty() ? std::nullopt : std::optional<int>(tokens.front());
}

void refuse_unsupported(const JsonObject& json) {
  if (json.boolean_or("rope_traditional", false)) json.refuse("rope_traditional", "false: halves of a head turn together");
  if (json.has("quantization_config") && !json.has("quantization"))
    json.refuse("quantization_config", "none: weights in F32, F16 or BF16, or packed by mlx_lm (\"quantization\")");
}

Activation read_activation(const JsonObject& json) {
  const char* field = json.has("hidden_activation") ? "hidden_activation" : "hidden_act";
  const std::string name = json.string_or(field, "silu");
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu_pytorch_tanh" || name == "gelu_new") return Activation::kGelu;
  json.refuse(field, "\"silu\", \"gelu_pytorch_tanh\" or \"gelu_new\"");
}

PackingConfig read_packing(const JsonObject& json, const PackingConfig& otherwise) {
  PackingConfig packing;
  packing.mode = json.string_or("mode", otherwise.mode);
  if (json.boolean_or("global_scale", false)) json.refuse("global_scale", "false");
  packing.group_size = static_cast<int>(json.integer_or("group_size", otherwise.group_size, 1, 1 << 16));
  packing.bits = static_cast<int>(json.integer_or("bits", otherwise.bits, 1, 64));
  const auto one_of = [&](const char* field, int value, std::vector<int> accepted) {
    if (std::find(accepted.begin(), accepted.end(), value) == accepted.end())
      json.refuse(field, fmt::format("one of {} in mode \"{}\"", fmt::join(accepted, ", "), packing.mode));
  };
  if (packing.mode == "affine") {
    one_of("group_size", packing.group_size, {32, 64, 128});
    one_of("bits", packing.bits, {2, 3, 4, 5, 6, 8});
  } else if (packing.mode == "mxfp4" || packing.mode == "mxfp8") {
    one_of("group_size", packing.group_size, {32});
    one_of("bits", packing.bits, {packing.mode == "mxfp4" ? 4 : 8});
  } else {
    json.refuse("mode", "\"affine\", \"mxfp4\" or \"mxfp8\"");
  }
  return packing;
}

// mlx_lm: {"group_size": 64, "bits": 4, "mode": "affine", "model.layers.0.mlp.down_proj": {"bits": 8} or false, …}.
void read_packings(const JsonObject& json, ModelConfig& config) {
  if (!json.has("quantization")) return;
  const JsonObject packing = json.object("quantization");
  config.packing = read_packing(packing, {});
  for (const auto& [module, value] : json.at("quantization").items()) {
    if (module == "group_size" || module == "bits" || module == "mode") continue;
    if (value.is_boolean()) {
      config.packings[module] = value.get<bool>() ? config.packing : std::nullopt;
    } else if (value.is_object()) {
      config.packings[module] = read_packing(packing.object(module), {});  // mlx_lm: affine unless the module says otherwise
    }
  }
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

// One that no sequence outgrows is none.
int read_window(const JsonObject& json, const ModelConfig& config) {
  const int window = size(json, "sliding_window", 1 << 30);
  return json.has("max_position_embeddings") && window >= config.max_position_embeddings ? 0 : window;
}

// By layer_types, where the config has them.
void read_layers(const JsonObject& json, ModelConfig& config) {
  config.layers.assign(static_cast<std::size_t>(config.num_layers), {});
  if (!json.has("layer_types")) return;
  const auto& types = json.at("layer_types");
  if (!types.is_array() || types.size() != config.layers.size())
    json.refuse("layer_types", fmt::format("a list of {} kinds of layer", config.num_layers));
  for (std::size_t i = 0; i < types.size(); ++i)
    if (types[i] == "sliding_attention") config.layers[i].sliding_window = read_window(json, config);
}

}  // namespace

void slide_layers(const JsonObject& json, ModelConfig& config, const std::function<bool(int layer)>& slides) {
  if (json.has("layer_types") || !json.has("sliding_window")) return;
  const int window = read_window(json, config);
  for (int i = 0; i < config.num_layers; ++i)
    if (slides(i)) config.layers[static_cast<std::size_t>(i)].sliding_window = window;
}

double rotary_share(const JsonObject& json) {
  const double outside = json.number_or("partial_rotary_factor", 1.0, 0.0, 1.0);
  return json.has("rope_parameters") ? json.object("rope_parameters").number_or("partial_rotary_factor", outside, 0.0, 1.0)
                                     : outside;
}

// transformers before 5: rope_theta and rope_scaling at the top; since then both in rope_parameters.
RopeConfig read_rope(const JsonObject& json, int dims) {
  RopeConfig rope;
  rope.dims = dims;
  rope.theta = json.number_or("rope_theta", rope.theta, 1e-3, 1e12);
  const char* field = json.has("rope_parameters") ? "rope_parameters" : "rope_scaling";
  if (!json.has(field)) return rope;
  return scale_rope(json.object(field), json, rope);
}

RopeConfig scale_rope(const JsonObject& scaling, const JsonObject& json, RopeConfig rope) {
  rope.theta = scaling.number_or("rope_theta", rope.theta, 1e-3, 1e12);
  const char* type_field = scaling.has("rope_type") ? "rope_type" : "type";
  const std::string type = scaling.string_or(type_field, "default");
  const auto factor = [&] { return scaling.number("factor", 1e-3, 1e6); };
  const auto original = [&](std::int64_t otherwise) {
    const JsonObject& holder = scaling.has("original_max_position_embeddings") ? scaling : json;
    return static_cast<int>(holder.integer_or("original_max_position_embeddings", otherwise, 1, kMaxSize));
  };
  if (type == "default") return rope;
  if (type == "linear") {
    rope.factor = factor();
    rope.scaling = RopeConfig::Scaling::kLinear;
  } else if (type == "llama3") {
    rope.factor = factor();
    rope.scaling = RopeConfig::Scaling::kLlama3;
    rope.low_freq_factor = scaling.number_or("low_freq_factor", rope.low_freq_factor, 1e-6, 1e6);
    rope.high_freq_factor = scaling.number_or("high_freq_factor", rope.high_freq_factor, 1e-6, 1e6);
    if (rope.high_freq_factor <= rope.low_freq_factor) scaling.refuse("high_freq_factor", "more than low_freq_factor");
    rope.original_max_position_embeddings = original(8192);
  } else if (type == "yarn") {
    rope.factor = factor();
    rope.scaling = RopeConfig::Scaling::kYarn;
    rope.beta_fast = scaling.number_or("beta_fast", rope.beta_fast, 1e-6, 1e6);
    rope.beta_slow = scaling.number_or("beta_slow", rope.beta_slow, 1e-6, 1e6);
    rope.original_max_position_embeddings = original(4096);
    const auto magnitude = [&](const char* field, double otherwise) {
      const double scale = scaling.number_or(field, otherwise, 0.0, 1e3);
      return rope.factor <= 1 ? 1.0 : 0.1 * scale * std::log(rope.factor) + 1.0;
    };
    rope.magnitude = magnitude("mscale", 1.0) / magnitude("mscale_all_dim", 0.0);
  } else if (type == "longrope" || type == "su") {
    rope.scaling = RopeConfig::Scaling::kLongRope;
    rope.original_max_position_embeddings = original(4096);
    const auto& factors = scaling.at("long_factor");
    const auto pairs = static_cast<std::size_t>(*rope.dims / 2);
    const bool numbers = factors.is_array() && factors.size() == pairs &&
                         std::all_of(factors.begin(), factors.end(), [](const auto& x) { return x.is_number() && x > 0; });
    if (!numbers) scaling.refuse("long_factor", fmt::format("a list of {} numbers above 0", pairs));
    rope.factors = factors.get<std::vector<double>>();
    const double stretch = json.number_or("max_position_embeddings", 131072, 1, 1 << 30) / rope.original_max_position_embeddings;
    if (stretch > 1) rope.magnitude = std::sqrt(1 + std::log(stretch) / std::log(rope.original_max_position_embeddings));
  } else {
    scaling.refuse(type_field, "\"default\", \"linear\", \"llama3\", \"yarn\" or \"longrope\"");
  }
  if (type == "yarn" || type == "longrope" || type == "su")
    rope.magnitude = scaling.number_or("attention_factor", rope.magnitude, 1e-3, 1e3);
  return rope;
}

std::vector<int> stored_layers(const ModelConfig& config, bool sliding) {
  std::vector<int> layers;
  for (int i = 0; i < config.num_layers; ++i)
    if (sliding || config.layers[static_cast<std::size_t>(i)].sliding_window == 0) layers.push_back(i);
  return layers;
}

ModelConfig read_config(const std::filesystem::path& folder) {
  if (!std::filesystem::is_directory(folder))
    throw_failure("model", "{}: not a folder; expected one with config.json and safetensors", folder.string());
  const auto path = folder / "config.json";
  return parse_config(read_file(path, kMaxConfigBytes), path.string());
}

std::vector<std::int32_t> read_stop_tokens(const std::filesystem::path& folder, const ModelConfig& config) {
  std::vector<std::int32_t> tokens;
  for (const char* name : {"config.json", "generation_config.json"}) {
    if (!std::filesystem::exists(folder / name)) continue;
    const auto document = read_json(folder / name);
    for (const auto token : read_tokens(JsonObject(document, (folder / name).string()), "eos_token_id", config.vocab_size))
      if (std::find(tokens.begin(), tokens.end(), token) == tokens.end()) tokens.push_back(token);
  }
  return tokens;
}

ModelConfig parse_config(std::string_view text, const std::string& source) {
  const auto document = parse_json(text, source);
  const JsonObject json(document, source);

  ModelConfig config;
  refuse_other_states(json);
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
  read_layers(json, config);
  read_packings(json, config);
  config.bos_token_id = read_token(json, "bos_token_id", config.vocab_size);
  config.eos_token_id = read_token(json, "eos_token_id", config.vocab_size);
  config.attention_scale = 1 / std::sqrt(static_cast<double>(config.head_dim));
  config.activation = read_activation(json);
  refuse_unsupported(json);
  family.configure(json, config);
  if (config.ropes.empty()) {
    if (const double share = rotary_share(json); share != 1.0)
      throw_failure("config", "{}: partial_rotary_factor: expected 1, got {}", json.where(), share);
    config.ropes = {read_rope(json, config.head_dim)};
  }
  return config;
}

}  // namespace veloxquant
