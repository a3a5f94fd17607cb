#include "veloxquant/model/model.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "veloxquant/core/error.h"
#include "veloxquant/kernels/openblas.h"
#include "veloxquant/model/experts.h"
#include "veloxquant/model/ops.h"
#include "veloxquant/model/weights.h"

namespace veloxquant {

struct Model::Layer {
  mx::array attention_norm;
  Linear query_key_value, output;
  std::optional<mx::array> query_norm, key_norm, attention_norm_after;
  mx::array mlp_norm;
  Linear gate_up, down;
  std::optional<Experts> experts;
  std::optional<mx::array> mlp_norm_after;
};

// Takes the tensors of one model by the names that Hugging Face gives them.
class Model::Reader {
 public:
  Reader(Weights& weights, const ModelConfig& config) : weights_(weights), config_(config) {}

  mx::array norm(const std::string& module, int size) {
    const auto weight = weights_.take(module + ".weight", {size});
    return config_.norm_offset == 0 ? weight : mx::add(weight, mx::array(static_cast<float>(config_.norm_offset)));
  }

  std::optional<mx::array> norm_if(bool there, const std::string& module, int size) {
    return there ? std::optional(norm(module, size)) : std::nullopt;
  }

  // count > 0: so many of them in one tensor.
  Matrix matrix(const std::string& module, int rows, int columns, int count = 0) {
    const auto own = config_.packings.find(module);
    return weights_.take_matrix(module, rows, columns, own == config_.packings.end() ? config_.packing : own->second, count);
  }

  Linear linear(const std::string& module, int out, int in, bool bias) { return maps({{module, out}}, in, bias); }

  struct Map {
    std::string module;
    int out;
  };

  // Maps of the same input.
  Linear maps(const std::vector<Map>& maps, int in, bool bias) {
    Linear linear;
    for (const auto& [module, out] : maps) {
      auto weight = matrix(module, out, in);
      linear.add(std::move(weight), bias ? std::optional(weights_.take(module + ".bias", {out})) : std::nullopt);
    }
    return linear;
  }

  // Maps of the same input that one tensor holds one after another.
  Linear joined(const std::string& module, const std::vector<int>& outs, int in) {
    const auto all = matrix(module, std::accumulate(outs.begin(), outs.end(), 0), in);
    Linear linear;
    int begin = 0;
    for (const int out : outs) linear.add(all.part(begin, begin + out), std::nullopt), begin += out;
    return linear;
  }

  Experts experts(const std::string& layer) {
    const auto& c = config_.experts;
    const std::string block = layer + c.block;
    const auto all = [&](const char* joined, const std::string& single, int rows, int columns) {
      const std::string module = block + "switch_mlp." + joined;
      if (weights_.has_matrix(module))
        return MatrixStack(matrix(module, rows, columns, c.count), c.count);  // as mlx_lm writes them
      std::vector<Matrix> matrices;
      for (int i = 0; i < c.count; ++i) matrices.push_back(matrix(fmt::format("{}experts.{}.{}", block, i, single), rows, columns));
      return MatrixStack(std::move(matrices));
    };
    ExpertStacks experts{all("gate_proj", c.gate, c.intermediate_size, config_.hidden_size),
                         all("up_proj", c.up, c.intermediate_size, config_.hidden_size),
                         all("down_proj", c.down, config_.hidden_size, c.intermediate_size)};
    return {linear(block + "gate", c.count, config_.hidden_size, false), std::move(experts), c, config_.activation};
  }

 private:
  Weights& weights_;
  const ModelConfig& config_;
};

namespace {

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

Model::Model(Model&&) noexcept = default;
Model::~Model() = default;

Model Model::load(const std::filesystem::path& folder) {
  auto config = read_config(folder);
  return {std::move(config), Weights(folder)};
}

Model Model::from_arrays(std::string_view config_json, const std::map<std::string, mx::array>& arrays, const std::string& source) {
  auto config = parse_config(config_json, source);
  return {std::move(config), Weights(arrays, source)};
}

Model::Model(ModelConfig config, Weights weights) : LanguageModel(config, make_identity(config, weights)) {
  openblas::warn_of_narrow_kernel();
  const ModelConfig& c = config_;
  for (const auto& rope : c.ropes) ropes_.emplace_back(rope, c.head_dim);
  Reader reader(weights, c);
  embedding_ = reader.matrix("model.embed_tokens", c.vocab_size, c.hidden_size);
  for (int i = 0; i < c.num_layers; ++i) {
    layers_.push_back(read_layer(reader, c, i));
    weights.skip(fmt::format("model.layers.{}.self_attn.rotary_emb.inv_freq", i));  // old checkpoints carry what the config implies
  }
  final_norm_ = reader.norm("model.norm", c.hidden_size);
  if (c.tie_word_embeddings.value_or(!weights.has_matrix("lm_head"))) {
    head_.add(*embedding_, std::nullopt);
    for (const char* name : {"lm_head.weight", "lm_head.scales", "lm_head.biases"}) weights.skip(name);
  } else {
    head_.add(reader.matrix("lm_head", c.vocab_size, c.hidden_size), std::nullopt);
  }
  weights.expect_all_taken();
}

Model::Layer Model::read_layer(Reader& reader, const ModelConfig& c, int index) {
  const std::string layer = fmt::format("model.layers.{}.", index), attention = layer + "self_attn.", mlp = layer + "mlp.";
  const int query_size = c.num_heads * c.head_dim, kv_size = c.num_kv_heads * c.head_dim, hidden = c.hidden_size;
  const bool mixed = c.layers[static_cast<std::size_t>(index)].experts;
  const auto query_key_value = [&] {
    if (c.joined_projections) return reader.joined(attention + "qkv_proj", {query_size, kv_size, kv_size}, hidden);
    return reader.maps({{attention + "q_proj", query_size}, {attention + "k_proj", kv_size}, {attention + "v_proj", kv_size}},
                       hidden, c.query_key_value_bias);
  };
  const auto gate_up = [&] {
    if (mixed) return Linear();
    if (c.joined_projections) return reader.joined(mlp + "gate_up_proj", {c.intermediate_size, c.intermediate_size}, hidden);
    return reader.maps({{mlp + "gate_proj", c.intermediate_size}, {mlp + "up_proj", c.intermediate_size}}, hidden, c.mlp_bias);
  };
  return {
      .attention_norm = reader.norm(layer + "input_layernorm", hidden),
      .query_key_value = query_key_value(),
      .output = reader.linear(attention + "o_proj", hidden, query_size, c.attention_output_bias),
      .query_norm = reader.norm_if(c.query_key_norm, attention + "q_norm", c.head_dim),
      .key_norm = reader.norm_if(c.query_key_norm, attention + "k_norm", c.head_dim),
      .attention_norm_after = reader.norm_if(c.norms_after, layer + "post_attention_layernorm", hidden),
      .mlp_norm = reader.norm(layer + (c.norms_after ? "pre_feedforward_layernorm" : "post_attention_layernorm"), hidden),
      .gate_up = gate_up(),
      .down = mixed ? Linear() : reader.linear(mlp + "down_proj", hidden, c.intermediate_size, c.mlp_bias),
      .experts = mixed ? std::optional(reader.experts(layer)) : std::nullopt,
      .mlp_norm_after = reader.norm_if(c.norms_after, layer + "post_feedforward_layernorm", hidden),
  };
}

namespace {

mx::array scaled(const mx::array& x, double factor) {
  return factor == 1 ? x : mx::multiply(x, mx::array(static_cast<float>(factor)));
}

}  // namespace

mx::array Model::embed(const mx::array& tokens) const {
  return scaled(veloxquant::embed(*embedding_, tokens), config_.embedding_scale);
}

mx::array Model::normed(const mx::array& x, const mx::array& weight) const {
  return rms_norm(x, weight, static_cast<float>(config_.rms_norm_eps));
}

mx::array Model::attention(int index, const mx::array& x, AttentionCache& cache) const {
  const Layer& layer = layers_[static_cast<std::size_t>(index)];
  const LayerConfig& kind = config_.layers[static_cast<std::size_t>(index)];
  const int batch = x.shape(0), tokens = x.shape(1);
  const auto parts = layer.query_key_value.parts(x);
  const auto heads = [&](const mx::array& part, int count, const std::optional<mx::array>& norm) {
    auto y = mx::reshape(part, {batch, tokens, count, config_.head_dim});
    if (norm) y = normed(y, *norm);
    return mx::transpose(y, {0, 2, 1, 3});
  };
  const AttentionSpec spec{.scale = static_cast<float>(config_.attention_scale),
                           .rope = &ropes_[static_cast<std::size_t>(kind.rope)],
                           .soft_cap = static_cast<float>(config_.attention_soft_cap),
                           .sliding_window = kind.sliding_window};
  const auto attended =
      cache.attend(heads(parts[0], config_.num_heads, layer.query_norm), heads(parts[1], config_.num_kv_heads, layer.key_norm),
                   heads(parts[2], config_.num_kv_heads, std::nullopt), spec);
  return mx::reshape(mx::transpose(attended, {0, 2, 1, 3}), {batch, tokens, config_.num_heads * config_.head_dim});
}

mx::array Model::layer(int index, const mx::array& hidden, AttentionCache& cache) const {
  const Layer& layer = layers_.at(static_cast<std::size_t>(index));
  const auto add = [&](const mx::array& part, const std::optional<mx::array>& norm, const mx::array& to) {
    return mx::add(to, scaled(norm ? normed(part, *norm) : part, config_.residual_scale));
  };
  // A map adds what it says to the rest itself where nothing stands between.
  const auto add_map = [&](const Linear& map, const mx::array& x, const std::optional<mx::array>& norm, const mx::array& to) {
    return norm || config_.residual_scale != 1 ? add(map(x), norm, to) : map(x, to);
  };
  const auto attended =
      add_map(layer.output, attention(index, normed(hidden, layer.attention_norm), cache), layer.attention_norm_after, hidden);
  const auto x = normed(attended, layer.mlp_norm);
  if (layer.experts) return add((*layer.experts)(x), layer.mlp_norm_after, attended);
  return add_map(layer.down, gate(config_.activation, layer.gate_up, x), layer.mlp_norm_after, attended);
}

namespace {

mx::array soft_capped(const mx::array& x, double cap) {
  const mx::array c(static_cast<float>(cap));
  return cap == 0 ? x : mx::multiply(mx::tanh(mx::divide(x, c)), c);
}

}  // namespace

mx::array Model::logits(const mx::array& hidden) const {
  return soft_capped(scaled(head_(normed(hidden, *final_norm_)), config_.logit_scale), config_.logit_soft_cap);
}

mx::array Model::hidden_gradient(const mx::array& hidden, const mx::array& gradient) const {
  const auto norm = [this](const std::vector<mx::array>& x) { return std::vector<mx::array>{normed(x[0], *final_norm_)}; };
  auto by_scores = gradient;
  if (config_.logit_soft_cap > 0) {
    const auto bent = mx::divide(logits(hidden), mx::array(static_cast<float>(config_.logit_soft_cap)));
    by_scores = mx::multiply(gradient, mx::subtract(mx::array(1.0f), mx::square(bent)));
  }
  return mx::vjp(norm, {hidden}, {head_.backward(scaled(by_scores, config_.logit_scale))}).second[0];
}

}  // namespace veloxquant
