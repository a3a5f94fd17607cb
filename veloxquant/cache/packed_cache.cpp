#include "veloxquant/cache/packed_cache.h"

#include <algorithm>
#include <stdexcept>

#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "veloxquant/cache/packed_arrays.h"
#include "veloxquant/core/parallel.h"
#include "veloxquant/model/attention.h"
#include "veloxquant/model/cpu_operation.h"

namespace veloxquant {

PackedCache::PackedCache(std::shared_ptr<const PackedLayer> layer)
    : layer_(std::move(layer)), sequences_(std::make_shared<std::vector<PackedSequence>>()) {}
PackedCache::~PackedCache() = default;

bool PackedCache::pending() const {
  if (!last_call_ || last_call_->is_available()) return false;
  // Streams are of threads.
  if (caller_ != std::this_thread::get_id()) throw std::logic_error("[packed cache] used from two threads at once");
  return true;
}

std::vector<PackedSequence>& PackedCache::sequences() const {
  if (pending()) mx::eval(*last_call_);
  last_call_.reset();
  if (sequences_->size() != counts_.size()) throw_incomplete();
  return *sequences_;
}

std::vector<int> PackedCache::tokens() const {
  std::vector<int> tokens;
  for (const auto& counts : counts_) tokens.push_back(static_cast<int>(counts.tokens));
  return tokens;
}

std::size_t PackedCache::nbytes() const {
  std::size_t bytes = 0;
  for (const auto& sequence : sequences()) bytes += sequence.nbytes();
  return bytes;
}

std::size_t PackedCache::coded_of(const Counts& counts) const {
  const std::size_t exact = layer_->window() + layer_->sinks();
  return std::max(counts.coded, counts.tokens > exact ? counts.tokens - exact : 0);
}

void PackedCache::check_shapes(const mx::array& q, const mx::array& k, const mx::array& v) const {
  check_units(k, layer_->units(Side::kKeys), layer_->units(Side::kValues), layer_->exact(Side::kKeys).dim());
  mx::Shape expected = k.shape();
  if (!counts_.empty()) expected[0] = static_cast<int>(counts_.size());
  if (kv_heads_ > 0) expected[1] = static_cast<int>(kv_heads_);
  check_chunk(q, k, v, expected);
}

std::vector<SequenceStep> PackedCache::steps(int batch, int tokens, const AttentionSpec& spec) const {
  auto held = this->tokens();
  held.resize(static_cast<std::size_t>(batch));  // of a first call
  const auto own = own_tokens(held, offset(), tokens, spec);
  std::vector<SequenceStep> steps;
  for (std::size_t b = 0; b < own.size(); ++b) {
    Counts counts = counts_.empty() ? Counts{} : counts_[b];
    SequenceStep step{.first = counts.tokens,
                      .coded_before = counts.coded,
                      .skipped = static_cast<std::size_t>(tokens - own[b]),
                      .tokens = static_cast<std::size_t>(own[b]),
                      .coded = 0};
    counts.tokens += step.tokens;
    step.coded = coded_of(counts);
    steps.push_back(step);
  }
  return steps;
}

mx::array PackedCache::attend(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionSpec& spec) {
  const InUse in_use(busy_);
  check_shapes(q, k, v);
  const auto steps = this->steps(k.shape(0), k.shape(2), spec);
  layer_->codecs(*spec.rope);  // or it is refused
  std::vector<int> positions;  // of the first token that comes, be it padding
  for (const auto& step : steps) positions.push_back(static_cast<int>(step.first) - static_cast<int>(step.skipped));
  const auto as_floats = [](const mx::array& x) { return mx::astype(x, mx::float32); };
  std::vector<mx::array> inputs = {as_floats((*spec.rope)(q, positions)),
                                   as_floats(layer_->keys_before_rope() ? k : (*spec.rope)(k, positions)), as_floats(v)};
  if (pending()) inputs.push_back(*last_call_);

  // Nothing is refused from here on.
  if (counts_.empty()) sequences_->resize(steps.size());
  counts_.clear();
  for (const auto& step : steps) counts_.push_back({step.first + step.tokens, step.coded});
  kv_heads_ = static_cast<std::size_t>(k.shape(1));
  offset_ += static_cast<std::size_t>(k.shape(2));
  const auto outputs = cpu_operation("PackedStep", std::move(inputs), {token_major_shape(q), {1}},
                                     [layer = layer_, steps, spec, sequences = sequences_](const auto& in, auto& out) {
                                       packed_step(*layer, steps, spec, in[0], in[1], in[2], *sequences, out[0]);
                                       out[1].template data<float>()[0] = 0;
                                     });
  last_call_ = outputs[1];
  caller_ = std::this_thread::get_id();
  return mx::astype(from_token_major(outputs[0]), q.dtype());
}

int PackedCache::trim(int tokens) {
  const InUse in_use(busy_);
  const auto dropped = std::min(static_cast<std::size_t>(std::max(tokens, 0)), offset_);
  auto& sequences = this->sequences();
  offset_ -= dropped;
  for (std::size_t b = 0; b < sequences.size(); ++b) {
    PackedSequence& sequence = sequences[b];
    sequence.tokens -= std::min(dropped, sequence.tokens);
    sequence.keep_coded(std::min(sequence.coded, sequence.tokens > layer_->sinks() ? sequence.tokens - layer_->sinks() : 0));
    counts_[b] = {sequence.tokens, sequence.coded};
  }
  return static_cast<int>(dropped);
}

std::unique_ptr<SavableCache> PackedCache::clone() const {
  const InUse in_use(busy_);
  auto copy = std::make_unique<PackedCache>(layer_);
  *copy->sequences_ = sequences();
  copy->counts_ = counts_;
  copy->kv_heads_ = kv_heads_;
  copy->offset_ = offset_;
  return copy;
}

namespace {

// Caches of one kind for every layer of a plan.
template <class Cache, class Layer>
CacheFactory factory_of(const Plan& plan) {
  struct Units {
    std::vector<QuantizerParameters> keys, values;
  };
  std::vector<Units> units(static_cast<std::size_t>(plan.model.num_layers));
  for (const auto& unit : plan.units) {
    auto& [keys, values] = units.at(static_cast<std::size_t>(unit.layer));
    (unit.side == Side::kKeys ? keys : values).push_back(unit.quantizer);
  }
  std::vector<std::shared_ptr<const Layer>> layers(units.size());  // null: the layer slides
  parallel_for(layers.size(), 1, [&](std::size_t layer, std::size_t) {
    auto& [keys, values] = units[layer];
    if (!keys.empty()) layers[layer] = std::make_shared<const Layer>(std::move(keys), std::move(values), plan.window, plan.sinks);
  });
  return [layers = std::move(layers)](int layer) -> std::unique_ptr<AttentionCache> {
    const auto& packed = layers.at(static_cast<std::size_t>(layer));
    if (!packed) return std::make_unique<FullCache>();
    return std::make_unique<Cache>(packed);
  };
}

}  // namespace

CacheFactory packed_factory(const Plan& plan) {
  return own_kernels() ? factory_of<PackedCache, PackedLayer>(plan) : factory_of<PackedArrays, PackedArraysLayer>(plan);
}

}  // namespace veloxquant
