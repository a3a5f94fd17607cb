#include <nanobind/stl/function.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>

#include "bindings.h"
#include "mlx/ops.h"
#include "veloxquant/cache/packed_cache.h"
#include "veloxquant/model/language_model.h"
#include "veloxquant/model/rope.h"

namespace veloxquant::python {
namespace {

// What a layer of a live model, whose attention has turned queries and keys already, finds in place of its cache: they are turned
// back, and the cache attends as it does in a model of the engine's.
class LiveAttention {
 public:
  LiveAttention(AttentionCache& cache, const Rope& rope, int turned_dims, int sliding_window)
      : cache_(cache), rope_(rope), turned_dims_(turned_dims), sliding_window_(sliding_window) {}

  int offset() const { return cache_.offset(); }

  mx::array attend(const mx::array& q, const mx::array& k, const mx::array& v, float scale) {
    return cache_.attend(turned_back(q), turned_back(k), v, {.scale = scale, .rope = &rope_, .sliding_window = sliding_window_});
  }

 private:
  // Turning by the opposite angles is turning the mirror image.
  mx::array turned_back(const mx::array& x) const {
    if (turned_dims_ == 0) return x;
    std::vector<float> signs(static_cast<std::size_t>(x.shape(-1)), 1.0f);
    std::fill(signs.begin() + turned_dims_ / 2, signs.begin() + turned_dims_, -1.0f);
    const mx::array mirror(signs.data(), {x.shape(-1)});
    return mx::multiply(rope_(mx::multiply(x, mirror), offset()), mirror);
  }

  AttentionCache& cache_;
  const Rope& rope_;
  int turned_dims_, sliding_window_;
};

struct LiveLayer {
  std::vector<double> radians;  // that each pair of dimensions turns a position: pair i of n is (i, i + n)
  int sliding_window;
};

// A model that a Python object runs: embed(tokens), layer(index, hidden, attention), logits(hidden).
class LiveModel : public LanguageModel {
 public:
  LiveModel(nb::object walk, ModelConfig config, ModelIdentity identity)
      : LanguageModel(std::move(config), std::move(identity)), walk_(std::move(walk)) {
    for (const auto& rope : config_.ropes) ropes_.emplace_back(rope, config_.head_dim);
  }

  mx::array embed(const mx::array& tokens) const override {
    const nb::gil_scoped_acquire interpreter;
    return nb::cast<mx::array>(walk_.attr("embed")(tokens));
  }

  mx::array layer(int index, const mx::array& hidden, AttentionCache& cache) const override {
    const nb::gil_scoped_acquire interpreter;
    const LayerConfig& layer = config_.layers.at(static_cast<std::size_t>(index));
    const auto rope = static_cast<std::size_t>(layer.rope);
    LiveAttention attention(cache, ropes_[rope], *config_.ropes[rope].dims, layer.sliding_window);
    return nb::cast<mx::array>(walk_.attr("layer")(index, hidden, nb::cast(&attention, nb::rv_policy::reference)));
  }

  mx::array logits(const mx::array& hidden) const override {
    const nb::gil_scoped_acquire interpreter;
    return nb::cast<mx::array>(walk_.attr("logits")(hidden));
  }

 private:
  nb::object walk_;
  std::vector<Rope> ropes_;
};

RopeConfig rope_of(const LiveLayer& layer) {
  RopeConfig rope;
  rope.theta = 1;
  rope.scaling = RopeConfig::Scaling::kLongRope;
  rope.dims = 2 * static_cast<int>(layer.radians.size());
  for (const double radians : layer.radians) rope.factors.push_back(1 / radians);
  return rope;
}

// Layers that turn alike share a rope.
void add_layer(const LiveLayer& layer, ModelConfig& config) {
  const RopeConfig rope = rope_of(layer);
  std::size_t at = 0;
  while (at < config.ropes.size() && config.ropes[at].factors != rope.factors) ++at;
  if (at == config.ropes.size()) config.ropes.push_back(rope);
  config.layers.push_back({.sliding_window = layer.sliding_window, .rope = static_cast<int>(at)});
}

LiveModel* make_live_model(nb::object walk, const std::string& architecture, const std::vector<LiveLayer>& layers, int hidden_size,
                           int intermediate_size, int num_heads, int num_kv_heads, int head_dim, int vocab_size,
                           int max_position_embeddings, std::optional<int> first_token) {
  ModelConfig config;
  config.model_type = architecture;
  config.num_layers = static_cast<int>(layers.size());
  config.hidden_size = hidden_size;
  config.intermediate_size = intermediate_size;
  config.num_heads = num_heads;
  config.num_kv_heads = num_kv_heads;
  config.head_dim = head_dim;
  config.vocab_size = vocab_size;
  config.max_position_embeddings = max_position_embeddings;
  config.bos_token_id = first_token;
  for (const auto& layer : layers) add_layer(layer, config);
  const ModelIdentity identity{.architecture = architecture,
                               .num_layers = config.num_layers,
                               .num_kv_heads = num_kv_heads,
                               .head_dim = head_dim,
                               .hidden_size = hidden_size,
                               .vocab_size = vocab_size,
                               .config_hash = "",
                               .weights_hash = ""};
  return new LiveModel(std::move(walk), std::move(config), identity);
}

// A cache of its own for a layer of a live model.
class LiveCache {
 public:
  LiveCache(std::unique_ptr<AttentionCache> cache, const LiveLayer& layer, int head_dim)
      : cache_(std::move(cache)),
        rope_(rope_of(layer), head_dim),
        attention_(*cache_, rope_, 2 * static_cast<int>(layer.radians.size()), layer.sliding_window) {}

  int offset() const { return cache_->offset(); }
  std::size_t nbytes() const { return cache_->nbytes(); }
  std::vector<mx::array> pending() const { return cache_->pending(); }
  mx::array attend(const mx::array& q, const mx::array& k, const mx::array& v, float scale) {
    return attention_.attend(q, k, v, scale);
  }

 private:
  std::unique_ptr<AttentionCache> cache_;
  Rope rope_;
  LiveAttention attention_;
};

// None for layers that the plan leaves as they are.
std::vector<std::unique_ptr<LiveCache>> packed_caches(const Plan& plan, const std::vector<LiveLayer>& layers) {
  const auto factory = packed_factory(plan);
  std::vector<std::unique_ptr<LiveCache>> caches;
  for (int i = 0; i < plan.model.num_layers; ++i) {
    const bool slides =
        std::any_of(plan.sliding.begin(), plan.sliding.end(), [i](const SlidingLayer& some) { return some.layer == i; });
    caches.push_back(slides ? nullptr
                            : std::make_unique<LiveCache>(factory(i), layers.at(static_cast<std::size_t>(i)), plan.model.head_dim));
  }
  return caches;
}

}  // namespace

void bind_live_model(nb::module_& module) {
  nb::class_<LiveAttention>(module, "LiveAttention", "Attention of one layer, while it runs.")
      .def_prop_ro("offset", &LiveAttention::offset)
      .def("attend", &LiveAttention::attend, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("scale"),
           "q [B, Hq, T, D], k and v [B, Hkv, T, D], float32, turned as the layer does → [B, Hq, T, D].");
  nb::class_<LiveLayer>(module, "LiveLayer")
      .def(
          "__init__",
          [](LiveLayer* self, std::vector<double> radians, int sliding_window) {
            new (self) LiveLayer{std::move(radians), sliding_window};
          },
          nb::arg("radians"), nb::arg("sliding_window"));
  nb::class_<LiveCache>(module, "LiveCache", "Keys and values of one layer, as a plan stores them.")
      .def_prop_ro("offset", &LiveCache::offset)
      .def_prop_ro("nbytes", &LiveCache::nbytes)
      .def_prop_ro("pending", &LiveCache::pending, "Arrays that may still have to be evaluated.")
      .def("attend", &LiveCache::attend, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("scale"), WithoutInterpreter(),
           "Appends k and v, and attends: as LiveAttention.attend.");
  module.def("packed_caches", &packed_caches, nb::arg("plan"), nb::arg("layers"), "One for each layer, None for those that slide.");
  nb::class_<LiveModel, LanguageModel>(module, "LiveModel", "A model that a Python object runs, layer by layer.");
  module.def("make_live_model", &make_live_model, nb::arg("walk"), nb::arg("architecture"), nb::arg("layers"),
             nb::arg("hidden_size"), nb::arg("intermediate_size"), nb::arg("num_heads"), nb::arg("num_kv_heads"),
             nb::arg("head_dim"), nb::arg("vocab_size"), nb::arg("max_position_embeddings"), nb::arg("first_token").none(),
             nb::rv_policy::take_ownership, "walk: embed(tokens), layer(index, hidden, attention), logits(hidden).");
}

}  // namespace veloxquant::python
