#include "veloxquant/model/model.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "veloxquant/core/error.h"
#include "veloxquant/model/ops.h"
#include "veloxquant/model/weights.h"

namespace veloxquant {

struct Model::Layer {
  mx::array attention_norm;
  Linear query_key_value, output;
  std::optional<mx::array> query_norm, key_norm;
  mx::array mlp_norm;
  Linear gate_up, down;
};

namespace {

// Takes the tensors of one model by the names that Hugging Face gives them.
class LayerReader {
 public:
  explicit LayerReader(Weights& weights) : weights_(weights) {}

  mx::array take(const std::string& name, const mx::Shape& shape) { return weights_.take(name, shape); }
  Matrix take_matrix(const std::string& name, int rows, int columns) { return weights_.take_matrix(name, rows, columns); }

  Linear linear(const std::string& name, int out, int in, bool bias) { return joined({{name, out}}, in, bias); }

  struct Map {
    std::string name;
    int out;
  };

  // Maps of the same input.
  Linear joined(const std::vector<Map>& maps, int in, bool bias) {
    Linear linear;
    for (const auto& [name, out] : maps) {
      auto weight = take_matrix(name + ".weight", out, in);
      linear.add(std::move(weight), bias ? std::optional(take(name + ".bias", {out})) : std::nullopt);
    }
    return linear;
  }

 private:
  Weights& weights_;
};

ModelIdentity make_identity(const ModelConfig& config, const Weights& weights) {
  ModelIdentity identity;
  identity.architecture = config.model_type;
  identity.num_layers = config.num_layers;
  identity.num_kv_heads = config.num_kv_heads;
  identity.head_dim = config.head_dim;
  identity.hidden_size = config.hidden_size;
  identity.vocab_size = config.vocab_size;
  identity.config_hash = config.hash;
  identity.weights_hash = weights.headers_hash();
  return identity;
}

}  // namespace

Model::Model(ModelConfig config) : config_(std::move(config)), rope_(config_.rope, config_.head_dim) {}
Model::Model(Model&&) noexcept = default;
Model::~Model() = default;

Model Model::load(const std::filesystem::path& folder) {
  Model model(read_config(folder));
  const ModelConfig& c = model.config_;
  Weights weights(folder);
  LayerReader reader(weights);
  model.identity_ = make_identity(c, weights);

  model.embedding_ = reader.take_matrix("model.embed_tokens.weight", c.vocab_size, c.hidden_size);
  const int query_size = c.num_heads * c.head_dim, kv_size = c.num_kv_heads * c.head_dim;
  for (int i = 0; i < c.num_layers; ++i) {
    const std::string layer = fmt::format("model.layers.{}.", i), attention = layer + "self_attn.", mlp = layer + "mlp.";
    const auto head_norm = [&](const char* name) {
      return c.query_key_norm ? std::optional(reader.take(attention + name, {c.head_dim})) : std::nullopt;
    };
    model.layers_.push_back({
        .attention_norm = reader.take(layer + "input_layernorm.weight", {c.hidden_size}),
        .query_key_value =
            reader.joined({{attention + "q_proj", query_size}, {attention + "k_proj", kv_size}, {attention + "v_proj", kv_size}},
                          c.hidden_size, c.query_key_value_bias),
        .output = reader.linear(attention + "o_proj", c.hidden_size, query_size, c.attention_output_bias),
        .query_norm = head_norm("q_norm.weight"),
        .key_norm = head_norm("k_norm.weight"),
        .mlp_norm = reader.take(layer + "post_attention_layernorm.weight", {c.hidden_size}),
        .gate_up = reader.joined({{mlp + "gate_proj", c.intermediate_size}, {mlp + "up_proj", c.intermediate_size}}, c.hidden_size,
                                 c.mlp_bias),
        .down = reader.linear(mlp + "down_proj", c.hidden_size, c.intermediate_size, c.mlp_bias),
    });
    weights.skip(attention + "rotary_emb.inv_freq");  // old checkpoints carry what the config implies
  }
  model.final_norm_ = reader.take("model.norm.weight", {c.hidden_size});
  if (c.tie_word_embeddings.value_or(!weights.has("lm_head.weight"))) {
    model.head_.add(*model.embedding_, std::nullopt);
    weights.skip("lm_head.weight");
  } else {
    model.head_.add(reader.take_matrix("lm_head.weight", c.vocab_size, c.hidden_size), std::nullopt);
  }
  weights.expect_all_taken();
  return model;
}

mx::array Model::embed(const mx::array& tokens) const {
  return veloxquant::embed(*embedding_, tokens);
}

mx::array Model::attention(const Layer& layer, const mx::array& x, AttentionCache& cache) const {
  const int batch = x.shape(0), tokens = x.shape(1);
  const auto parts = layer.query_key_value.parts(x);
  const auto heads = [&](const mx::array& part, int count, const std::optional<mx::array>& norm) {
    auto y = mx::reshape(part, {batch, tokens, count, config_.head_dim});
    if (norm) y = rms_norm(y, *norm, static_cast<float>(config_.rms_norm_eps));
    return mx::transpose(y, {0, 2, 1, 3});
  };
  const AttentionSpec spec{.scale = 1.0f / std::sqrt(static_cast<float>(config_.head_dim)), .rope = &rope_};
  const auto attended =
      cache.attend(heads(parts[0], config_.num_heads, layer.query_norm), heads(parts[1], config_.num_kv_heads, layer.key_norm),
                   heads(parts[2], config_.num_kv_heads, std::nullopt), spec);
  return mx::reshape(mx::transpose(attended, {0, 2, 1, 3}), {batch, tokens, config_.num_heads * config_.head_dim});
}

mx::array Model::layer(int index, const mx::array& hidden, AttentionCache& cache) const {
  const Layer& layer = layers_.at(static_cast<std::size_t>(index));
  const auto eps = static_cast<float>(config_.rms_norm_eps);
  const auto attended = layer.output(attention(layer, rms_norm(hidden, layer.attention_norm, eps), cache), hidden);
  return layer.down(silu_gate(layer.gate_up, rms_norm(attended, layer.mlp_norm, eps)), attended);
}

mx::array Model::logits(const mx::array& hidden) const {
  return head_(rms_norm(hidden, *final_norm_, static_cast<float>(config_.rms_norm_eps)));
}

int Model::logit_rows() const {
  constexpr int kLogits = 1 << 22;  // 16 MiB
  return std::max(1, kLogits / config_.vocab_size);
}

mx::array Model::hidden_gradient(const mx::array& hidden, const mx::array& gradient) const {
  const auto norm = [this](const std::vector<mx::array>& x) {
    return std::vector<mx::array>{rms_norm(x[0], *final_norm_, static_cast<float>(config_.rms_norm_eps))};
  };
  return mx::vjp(norm, {hidden}, {head_.backward(gradient)}).second[0];
}

mx::array Model::forward(const mx::array& tokens, const AttentionCaches& caches) const {
  auto hidden = embed(tokens);
  for (int i = 0; i < config_.num_layers; ++i) hidden = layer(i, hidden, *caches.at(static_cast<std::size_t>(i)));
  return hidden;
}

AttentionCaches Model::make_caches(const CacheFactory& factory) const {
  AttentionCaches caches;
  for (int i = 0; i < config_.num_layers; ++i) caches.push_back(factory(i));
  return caches;
}

}  // namespace veloxquant
