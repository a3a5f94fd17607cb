#include <nanobind/stl/filesystem.h>
#include <nanobind/stl/function.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <set>

#include "bindings.h"
#include "mlx/ops.h"
#include "veloxquant/cache/packed_cache.h"
#include "veloxquant/core/error.h"
#include "veloxquant/core/safetensors.h"
#include "veloxquant/model/array_entry.h"
#include "veloxquant/model/language_model.h"
#include "veloxquant/model/rope.h"
#include "veloxquant/plan/plan_file.h"

namespace veloxquant::python {
namespace {

// What a layer of a live model, whose attention has turned queries and keys already, finds in place of its cache: they are turned
// back, and the cache attends as it does in a model of the engine's.
class LiveAttention {
 public:
  LiveAttention(AttentionCache& cache, const Rope& rope, int turned_dims, int sliding_window)
      : cache_(cache), rope_(rope), turned_dims_(turned_dims), sliding_window_(sliding_window) {}

  int offset() const { return cache_.offset(); }

  // padding, of each sequence, as AttentionSpec has it, or none; q and k are turned by positions behind it.
  mx::array attend(const mx::array& q, const mx::array& k, const mx::array& v, float scale, const std::vector<int>& padding = {}) {
    AttentionSpec spec{.scale = scale, .rope = &rope_, .sliding_window = sliding_window_};
    if (!padding.empty()) spec.padding = mx::array(padding.begin(), {static_cast<int>(padding.size())}, mx::int32);
    std::vector<int> positions(std::max<std::size_t>(1, padding.size()), offset());
    for (std::size_t b = 0; b < padding.size(); ++b) positions[b] -= padding[b];
    return cache_.attend(turned_back(q, positions), turned_back(k, positions), v, spec);
  }

 private:
  // Turning by the opposite angles is turning the mirror image.
  mx::array turned_back(const mx::array& x, const std::vector<int>& positions) const {
    if (turned_dims_ == 0) return x;
    std::vector<float> signs(static_cast<std::size_t>(x.shape(-1)), 1.0f);
    std::fill(signs.begin() + turned_dims_ / 2, signs.begin() + turned_dims_, -1.0f);
    const mx::array mirror(signs.data(), {x.shape(-1)});
    return mx::multiply(rope_(mx::multiply(x, mirror), positions), mirror);
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

// Makes the packed cache of a layer.
using MakePacked = std::function<std::unique_ptr<PackedAttentionCache>()>;

std::unique_ptr<PackedAttentionCache> as_packed(std::unique_ptr<AttentionCache> cache) {
  return std::unique_ptr<PackedAttentionCache>(dynamic_cast<PackedAttentionCache*>(cache.release()));
}

// A cache of its own for a layer of a live model.
class LiveCache {
 public:
  // The cache itself is made if none is given.
  LiveCache(MakePacked make, const LiveLayer& layer, int head_dim, std::unique_ptr<PackedAttentionCache> cache = nullptr)
      : make_(std::move(make)),
        layer_(layer),
        head_dim_(head_dim),
        cache_(cache ? std::move(cache) : make_()),
        rope_(rope_of(layer), head_dim),
        attention_(*cache_, rope_, 2 * static_cast<int>(layer.radians.size()), layer.sliding_window) {}

  int offset() const { return cache_->offset(); }
  std::vector<int> tokens() const { return cache_->tokens(); }
  std::size_t nbytes() const { return cache_->nbytes(); }
  int trim(int tokens) { return cache_->trim(tokens); }

  // own: how many of the tokens, the last, are each sequence's; none given: all.
  mx::array attend(const mx::array& q, const mx::array& k, const mx::array& v, float scale, const std::vector<int>& own) {
    std::vector<int> padding = tokens();
    if (padding.size() != own.size() && !own.empty())
      throw_invalid("packed cache", "expected tokens of {} sequences, got {}", padding.size(), own.size());
    for (std::size_t b = 0; b < padding.size(); ++b)
      padding[b] = offset() + k.shape(2) - padding[b] - (own.empty() ? k.shape(2) : own[b]);
    if (std::all_of(padding.begin(), padding.end(), [](int skipped) { return skipped == 0; })) padding.clear();
    return attention_.attend(q, k, v, scale, padding);
  }

  // A cache that no token has come to is that of one sequence, unless it is known to be of more.
  CacheState state() const { return tokens().empty() ? empty_state(1) : cache_->state(); }
  void restore(const CacheState& state) {
    CacheState held;
    for (const auto& [name, array] : state) held.emplace(name, on_cpu(array));
    cache_->restore(held);
  }

  std::unique_ptr<LiveCache> clone() const {
    return std::make_unique<LiveCache>(make_, layer_, head_dim_, as_packed(cache_->clone()));
  }
  std::unique_ptr<LiveCache> select(const std::vector<int>& sequences) const { return with(select_sequences(state(), sequences)); }
  std::unique_ptr<LiveCache> join(const std::vector<const LiveCache*>& others) const {
    std::vector<CacheState> states{state()};
    for (const auto* other : others) states.push_back(other->state());
    return with(join_sequences(states));
  }

 private:
  std::unique_ptr<LiveCache> with(const CacheState& state) const {
    auto cache = std::make_unique<LiveCache>(make_, layer_, head_dim_);
    cache->cache_->restore(state);
    return cache;
  }

  MakePacked make_;
  LiveLayer layer_;
  int head_dim_;
  std::unique_ptr<PackedAttentionCache> cache_;
  Rope rope_;
  LiveAttention attention_;
};

// Caches of a live model, as a plan stores them: codebooks are theirs together.
class LiveCaches {
 public:
  LiveCaches(const Plan& plan, std::vector<LiveLayer> layers)
      : identity_(plan_identity(plan)), head_dim_(plan.model.head_dim), layers_(std::move(layers)), factory_(packed_factory(plan)) {
    for (const auto& slides : plan.sliding) sliding_.insert(slides.layer);
  }

  const std::string& identity() const { return identity_; }

  // None for a layer that the plan leaves as it is.
  std::unique_ptr<LiveCache> cache(int layer) const {
    const LiveLayer& of = layers_.at(static_cast<std::size_t>(layer));
    if (sliding_.contains(layer)) return nullptr;
    return std::make_unique<LiveCache>([factory = factory_, layer] { return as_packed(factory(layer)); }, of, head_dim_);
  }

 private:
  std::string identity_;
  int head_dim_;
  std::vector<LiveLayer> layers_;
  CacheFactory factory_;
  std::set<int> sliding_;
};

}  // namespace

void bind_live_model(nb::module_& module) {
  nb::class_<LiveAttention>(module, "LiveAttention", "Attention of one layer, while it runs.")
      .def_prop_ro("offset", &LiveAttention::offset)
      .def("attend", &LiveAttention::attend, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("scale"),
           nb::arg("padding") = std::vector<int>{},
           "q [B, Hq, T, D], k and v [B, Hkv, T, D], float32, turned as the layer does → [B, Hq, T, D].");
  nb::class_<LiveLayer>(module, "LiveLayer")
      .def(
          "__init__",
          [](LiveLayer* self, std::vector<double> radians, int sliding_window) {
            new (self) LiveLayer{std::move(radians), sliding_window};
          },
          nb::arg("radians"), nb::arg("sliding_window"));
  nb::class_<LiveCache>(module, "LiveCache", "Keys and values of one layer, as a plan stores them: docs of PackedAttentionCache.")
      .def_prop_ro("offset", &LiveCache::offset)
      .def_prop_ro("tokens", &LiveCache::tokens, "Of each sequence, without padding; none before the first call.")
      .def_prop_ro("nbytes", &LiveCache::nbytes)
      .def("attend", &LiveCache::attend, nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("scale"), nb::arg("own"),
           WithoutInterpreter(),
           "Appends k and v, and attends: as LiveAttention.attend.  own: how many of the tokens, the last, are "
           "each sequence's; empty: all.")
      .def("trim", &LiveCache::trim, nb::arg("tokens"), WithoutInterpreter())
      .def("clone", &LiveCache::clone, WithoutInterpreter())
      .def("state", &LiveCache::state, WithoutInterpreter())
      .def("restore", &LiveCache::restore, nb::arg("state"), WithoutInterpreter())
      .def("select", &LiveCache::select, nb::arg("sequences"), WithoutInterpreter(), "A cache of these sequences.")
      .def("join", &LiveCache::join, nb::arg("others"), WithoutInterpreter(), "A cache of its sequences and theirs.");
  nb::class_<LiveCaches>(module, "LiveCaches", "Packed caches of a live model.")
      .def(nb::init<const Plan&, std::vector<LiveLayer>>(), nb::arg("plan"), nb::arg("layers"), WithoutInterpreter())
      .def_prop_ro("identity", &LiveCaches::identity, "Of the plan.")
      .def("cache", &LiveCaches::cache, nb::arg("layer"), "An empty one; None for a layer that the plan leaves as it is.");
  module.def(
      "state_checksum",
      [](const std::string& text, const CacheState& state) {
        CacheState held;
        for (const auto& [name, array] : state) held.emplace(name, on_cpu(array));
        return checksum(text, held);
      },
      nb::arg("text"), nb::arg("state"), WithoutInterpreter());
  module.def(
      "check_safetensors", [](const std::filesystem::path& path) { SafetensorsFile file(path); }, nb::arg("path"),
      WithoutInterpreter(), "RuntimeError that names what is wrong with the file as such.");
  nb::class_<LiveModel, LanguageModel>(module, "LiveModel", "A model that a Python object runs, layer by layer.");
  module.def("make_live_model", &make_live_model, nb::arg("walk"), nb::arg("architecture"), nb::arg("layers"),
             nb::arg("hidden_size"), nb::arg("intermediate_size"), nb::arg("num_heads"), nb::arg("num_kv_heads"),
             nb::arg("head_dim"), nb::arg("vocab_size"), nb::arg("max_position_embeddings"), nb::arg("first_token").none(),
             nb::rv_policy::take_ownership, "walk: embed(tokens), layer(index, hidden, attention), logits(hidden).");
}

}  // namespace veloxquant::python
