#include "veloxquant/cache/packed_cache.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "veloxquant/cache/packed_arrays.h"
#include "veloxquant/core/error.h"
#include "veloxquant/core/parallel.h"
#include "veloxquant/kernels/rope.h"
#include "veloxquant/kernels/running_softmax.h"
#include "veloxquant/model/attention.h"
#include "veloxquant/model/cpu_operation.h"

namespace veloxquant {

PackedLayer::PackedLayer(std::vector<QuantizerParameters> keys, std::vector<QuantizerParameters> values, int window, int sinks)
    : keys_(std::move(keys)),
      values_(std::move(values)),
      exact_keys_(make_quantizer(exact_parameters(Side::kKeys, keys_.at(0).dim))),
      exact_values_(make_quantizer(exact_parameters(Side::kValues, keys_.at(0).dim))),
      keys_before_rope_(quantizer_method(keys_.at(0).method).keys_before_rope),
      window_(static_cast<std::size_t>(window)),
      sinks_(static_cast<std::size_t>(sinks)) {
  for (const auto& unit : keys_) key_shapes_.push_back(block_shape(unit));
  for (const auto& unit : values_) value_shapes_.push_back(block_shape(unit));
}

PackedHead PackedLayer::head(std::size_t head) const {
  const auto side = [&](Side which, const std::vector<BlockShape>& shapes) {
    return PackedSide{.exact = ExactStore(exact(which), window_, sinks_), .shape = unit(shapes, head)};
  };
  return {side(Side::kKeys, key_shapes_), side(Side::kValues, value_shapes_)};
}

StateSizes PackedLayer::state_sizes(std::size_t kv_heads) const {
  std::size_t bytes = 0, patches = 0;
  for (const auto* shapes : {&key_shapes_, &value_shapes_})
    for (std::size_t head = 0; head < kv_heads; ++head) {
      const BlockShape& shape = unit(*shapes, head);
      bytes += shape.bytes;
      patches = std::max(patches, shape.patches);
    }
  const auto size = [](std::size_t n) { return static_cast<int>(n); };
  return {.heads = size(kv_heads),
          .block_bytes = size(bytes),
          .patches = size(patches),
          .sinks = size(sinks_),
          .window = size(window_),
          .token_bytes = size(exact_keys_->encoded_bytes(1))};
}

const PackedLayer::Codecs& PackedLayer::codecs(const Rope& rope) const {
  std::call_once(made_, [&] {
    rope_ = rope;
    Codecs made;  // none where one is refused
    for (const auto& unit : keys_) made.keys.push_back(make_block_codec(unit, keys_before_rope_ ? &*rope_ : nullptr));
    for (const auto& unit : values_) made.values.push_back(make_block_codec(unit, nullptr));
    codecs_ = std::move(made);
  });
  return codecs_;
}

// What a call does to a sequence.
struct PackedCache::Step {
  std::size_t first, coded_before;  // tokens, and codes, that it had
  std::size_t skipped, tokens;      // of those that come, the first are not its own

  std::size_t position(std::size_t token) const { return first + token - skipped; }
};

namespace {

// Results of some queries over a stretch of keys, relative to a maximum of its own.
struct Partial {
  std::vector<float> maximum, sum, values;  // [rows], [rows], [rows, dim]

  void begin(std::size_t rows, std::size_t dim) {
    maximum.assign(rows, std::numeric_limits<float>::lowest());
    sum.assign(rows, 0.0f);
    values.assign(rows * dim, 0.0f);
  }
};

struct Range {
  std::size_t begin, end;
};

}  // namespace

// Queries over everything that is stored, in the order: codes, sinks, window.
class PackedCache::Attention {
 public:
  // q and out [batch, kv_heads, tokens, queries of a KV head, dim]: those of some tokens after one another are one matrix.
  Attention(const PackedCache& cache, const std::vector<Step>& steps, const AttentionSpec& spec, const mx::array& q, float* out)
      : cache_(cache),
        layer_(*cache.layer_),
        codecs_(layer_.codecs(*spec.rope)),
        steps_(steps),
        spec_(spec),
        q_(q.data<float>()),
        kv_heads_(static_cast<std::size_t>(q.shape(1))),
        tokens_(static_cast<std::size_t>(q.shape(2))),
        group_(static_cast<std::size_t>(q.shape(3))),
        rows_(tokens_ * group_),
        dim_(static_cast<std::size_t>(q.shape(4))),
        out_(out),
        prepared_(memory()) {}

  // recent: keys and values [tokens behind the codes, dim] of each head, not turned where they are stored so.
  void run(const std::vector<std::vector<float>>& recent_keys, const std::vector<std::vector<float>>& recent_values) {
    std::size_t blocks = 0;
    for (const auto& sequence : cache_.sequences_) blocks = std::max(blocks, blocks_of(sequence.coded));
    const std::size_t heads = cache_.sequences_.size() * kv_heads_,
                      parts = std::min(blocks, std::max<std::size_t>(1, (kTasks + heads - 1) / heads));
    prepare();
    std::vector<Partial> partials(heads * (parts + 1));
    parallel_for(partials.size(), 1, [&](std::size_t i, std::size_t) {
      const std::size_t head = i / (parts + 1), part = i % (parts + 1);
      partials[i].begin(rows_, dim_);
      if (part == parts) {
        attend_exact(head, recent_keys[head], recent_values[head], partials[i]);
      } else {
        const std::size_t held = blocks_of(sequence_of(head).coded);
        for (std::size_t block = held * part / parts; block < held * (part + 1) / parts; ++block) {
          if (block + 1 < held * (part + 1) / parts) fetch_block(head, block + 1);
          attend_block(head, block, partials[i]);
        }
      }
    });
    // A few rows are merged before another thread is awake.
    parallel_for(heads, rows_ < kFewRows ? heads : 1, [&](std::size_t begin, std::size_t end) {
      for (std::size_t head = begin; head < end; ++head) merge(head, {partials.data() + head * (parts + 1), parts + 1});
    });
  }

 private:
  // Even out the threads, the same on every machine.
  static constexpr std::size_t kTasks = 16;
  static constexpr std::size_t kFewRows = 32;
  static constexpr std::size_t kCacheLine = 64;

  // What is prepared is large, and the same for layer after layer.
  static std::vector<PreparedQueries>& memory() {
    thread_local std::vector<PreparedQueries> prepared;
    return prepared;
  }

  const Sequence& sequence_of(std::size_t head) const { return cache_.sequences_[head / kv_heads_]; }
  const PackedHead& head_at(std::size_t head) const { return sequence_of(head).heads[head % kv_heads_]; }
  const Step& step_of(std::size_t head) const { return steps_[head / kv_heads_]; }

  // Positions that the queries of a token see, as far as attention goes; none for one that is not its sequence's.
  Range seen(std::size_t head, std::size_t token) const {
    const Step& step = step_of(head);
    const std::size_t window = static_cast<std::size_t>(spec_.sliding_window);
    if (token < step.skipped) return {0, 0};
    const std::size_t end = step.position(token) + 1;
    return {window > 0 && end > window ? end - window : 0, end};
  }

  // Where a query that sees positions up to `end` begins to read the 8 bits of tokens: in front of its window, or behind the codes
  // where those reach into it.
  std::size_t exact_begin(std::size_t head, std::size_t end) const {
    return std::max(end > layer_.window() ? end - layer_.window() : 0, layer_.sinks() + step_of(head).coded_before);
  }

  // Of the positions [begin, end): those that a query reads there.
  static Range within(Range seen, std::size_t begin, std::size_t end) {
    const std::size_t from = std::clamp(seen.begin, begin, end), to = std::clamp(seen.end, from, end);
    return {from - begin, to - begin};
  }

  // Attention to `count` tokens, of which the queries of a token read range_of(token): an interval that moves on from token to
  // token.  score(queries, scores [queries, count]) and add(weights [queries, count], queries, sums [queries, dim]) are called for
  // the queries that read any, or, of few, for all.
  template <class RangeOf, class Score, class Add>
  void attend(std::size_t head, std::size_t count, RangeOf range_of, Score score, Add add, Partial& partial) const {
    const auto reads = [&](std::size_t token) {
      const auto [from, to] = range_of(token);
      return from < to;
    };
    std::size_t begin = 0, end = tokens_;
    while (begin < end && !reads(begin)) ++begin;
    while (begin < end && !reads(end - 1)) --end;
    if (begin == end) return;
    if (rows_ < kManyQueries) begin = 0, end = tokens_;
    const std::size_t first_row = begin * group_, rows = (end - begin) * group_;
    thread_local std::vector<float> scores;
    scores.resize(rows * count);
    score(queries(head, begin, end), scores.data());
    for (std::size_t row = 0; row < rows; ++row) {
      float* of_row = scores.data() + row * count;
      const auto [from, to] = range_of(begin + row / group_);
      std::fill(of_row, of_row + from, 0.0f);
      std::fill(of_row + to, of_row + count, 0.0f);
      const std::size_t at = first_row + row;
      const float shrink = running_softmax(of_row + from, to - from, spec_.soft_cap, partial.maximum[at], partial.sum[at]);
      if (shrink != 1.0f)
        for (std::size_t i = at * dim_; i < (at + 1) * dim_; ++i) partial.values[i] *= shrink;
    }
    add(scores.data(), rows, partial.values.data() + first_row * dim_);
  }

  // Each KV head's queries, for the blocks that its sequence has.
  void prepare() {
    prepared_.resize(cache_.sequences_.size() * kv_heads_);
    parallel_for(prepared_.size(), 1, [&](std::size_t head, std::size_t) {
      prepared_[head].first_position = layer_.sinks();
      prepared_[head].num_blocks = blocks_of(sequence_of(head).coded);
      codec(Side::kKeys, head).prepare(queries(head, 0, tokens_), prepared_[head]);
    });
  }

  const BlockCodec& codec(Side side, std::size_t head) const { return codecs_.of(side, head % kv_heads_); }

  // Of tokens begin … end − 1.
  BlockQueries queries(std::size_t head, std::size_t begin, std::size_t end) const {
    return {q_ + (head * rows_ + begin * group_) * dim_, (end - begin) * group_, spec_.scale};
  }

  // While others are computed with: their lines lie too far apart for what processors fetch by themselves.
  void fetch_block(std::size_t head, std::size_t block) const {
    for (const auto* side : {&head_at(head).keys, &head_at(head).values})
      for (std::size_t i = 0; i < side->blocks[block].size(); i += kCacheLine) __builtin_prefetch(&side->blocks[block][i]);
  }

  void attend_block(std::size_t head, std::size_t block, Partial& partial) const {
    const PackedHead& of = head_at(head);
    const std::size_t first = block * kPackedBlockTokens, count = std::min(kPackedBlockTokens, sequence_of(head).coded - first),
                      begin = layer_.sinks() + first;
    attend(
        head, count,
        [&](std::size_t token) {
          auto sees = seen(head, token);
          sees.end = std::min(sees.end, exact_begin(head, sees.end));
          return within(sees, begin, begin + count);
        },
        [&](const BlockQueries& queries, float* scores) {
          codec(Side::kKeys, head).score(of.keys.blocks[block].data(), count, begin, queries, prepared_[head], scores, count);
        },
        [&](const float* weights, std::size_t queries, float* sums) {
          codec(Side::kValues, head).add(of.values.blocks[block].data(), count, weights, queries, count, sums);
        },
        partial);
  }

  // Sinks, then the window and the tokens that have just come.
  void attend_exact(std::size_t head, const std::vector<float>& recent_keys, const std::vector<float>& recent_values,
                    Partial& partial) const {
    const PackedHead& of = head_at(head);
    const std::size_t sinks = std::min(layer_.sinks(), sequence_of(head).tokens);
    std::vector<float> k(sinks * dim_), v(sinks * dim_);
    for (std::size_t p = 0; p < sinks; ++p) {
      of.keys.exact.read(p, k.data() + p * dim_);
      of.values.exact.read(p, v.data() + p * dim_);
    }
    attend_vectors(
        head, k, v, 0, [&](std::size_t token) { return seen(head, token); }, partial);
    attend_vectors(
        head, recent_keys, recent_values, layer_.sinks() + step_of(head).coded_before,
        [&](std::size_t token) {
          auto sees = seen(head, token);
          sees.begin = std::max(sees.begin, exact_begin(head, sees.end));
          return sees;
        },
        partial);
  }

  // In stretches, since a query reads few of many.  sees(token): positions.
  template <class Sees>
  void attend_vectors(std::size_t head, std::vector<float> k, const std::vector<float>& v, std::size_t first, Sees sees,
                      Partial& partial) const {
    constexpr std::size_t kStretch = 64;
    const std::size_t all = k.size() / dim_;
    if (all == 0) return;
    const auto stride = static_cast<std::ptrdiff_t>(dim_);
    if (const Rope& rope = *spec_.rope; layer_.keys_before_rope() && !rope.frequencies().empty())
      veloxquant::rope({1, 1, all, dim_}, {k.data(), 0, 0, stride}, rope.frequencies(), rope.magnitude(),
                       static_cast<std::ptrdiff_t>(first), {k.data(), 0, 0, stride});
    for (std::size_t at = 0; at < all; at += kStretch) {
      const std::size_t count = std::min(kStretch, all - at), begin = first + at;
      attend(
          head, count, [&](std::size_t token) { return within(sees(token), begin, begin + count); },
          [&](const BlockQueries& queries, float* scores) {
            score_vectors(queries, k.data() + at * dim_, count, dim_, dim_, scores, count);
          },
          [&](const float* weights, std::size_t queries, float* sums) {
            add_vectors(weights, queries, count, v.data() + at * dim_, count, dim_, dim_, sums);
          },
          partial);
    }
  }

  // The last part is of exact tokens, the others are sums in the space of the codes.
  void merge(std::size_t head, std::span<const Partial> parts) const {
    std::vector<float> coded(rows_ * dim_), coded_sums(rows_), totals(rows_), exact_weights(rows_);
    for (std::size_t row = 0; row < rows_; ++row) {
      float top = std::numeric_limits<float>::lowest();
      for (const auto& part : parts) top = std::max(top, part.maximum[row]);
      for (const auto& part : parts) {
        if (part.sum[row] == 0) continue;
        const float weight = std::exp(part.maximum[row] - top);
        totals[row] += weight * part.sum[row];
        if (&part == &parts.back()) {
          exact_weights[row] = weight;
          continue;
        }
        coded_sums[row] += weight * part.sum[row];
        for (std::size_t i = 0; i < dim_; ++i) coded[row * dim_ + i] += weight * part.values[row * dim_ + i];
      }
    }
    if (parts.size() > 1) codec(Side::kValues, head).finish(coded, coded_sums);
    float* out = out_ + head * rows_ * dim_;
    for (std::size_t row = 0; row < rows_; ++row)
      for (std::size_t i = row * dim_; i < (row + 1) * dim_; ++i)
        out[i] = totals[row] > 0 ? (coded[i] + exact_weights[row] * parts.back().values[i]) / totals[row] : 0.0f;
  }

  const PackedCache& cache_;
  const PackedLayer& layer_;
  const PackedLayer::Codecs& codecs_;
  const std::vector<Step>& steps_;
  const AttentionSpec& spec_;
  const float* q_;
  std::size_t kv_heads_, tokens_, group_, rows_, dim_;
  float* out_;
  std::vector<PreparedQueries>& prepared_;  // [heads]
};

namespace {

mx::array as_floats(const mx::array& x) {
  return mx::contiguous(mx::astype(x, mx::float32));
}

}  // namespace

PackedCache::PackedCache(std::shared_ptr<const PackedLayer> layer) : layer_(std::move(layer)) {}
PackedCache::~PackedCache() = default;

std::vector<int> PackedCache::tokens() const {
  std::vector<int> tokens;
  for (const auto& sequence : sequences_) tokens.push_back(static_cast<int>(sequence.tokens));
  return tokens;
}

std::size_t PackedCache::nbytes() const {
  std::size_t bytes = 0;
  for (const auto& sequence : sequences_)
    for (const auto& [keys, values] : sequence.heads) bytes += keys.nbytes() + values.nbytes();
  return bytes;
}

std::size_t PackedCache::coded_of(const Sequence& sequence) const {
  const std::size_t exact = layer_->window() + layer_->sinks();
  return std::max(sequence.coded, sequence.tokens > exact ? sequence.tokens - exact : 0);
}

void PackedCache::begin(std::size_t kv_heads) {
  for (auto& sequence : sequences_)
    for (std::size_t head = sequence.heads.size(); head < kv_heads; ++head) sequence.heads.push_back(layer_->head(head));
}

void PackedCache::check_shapes(const mx::array& q, const mx::array& k, const mx::array& v) const {
  check_units(k, layer_->units(Side::kKeys), layer_->units(Side::kValues), layer_->exact(Side::kKeys).dim());
  mx::Shape expected = k.shape();
  if (!sequences_.empty()) {
    expected[0] = static_cast<int>(sequences_.size());
    if (!sequences_[0].heads.empty()) expected[1] = static_cast<int>(sequences_[0].heads.size());
  }
  check_chunk(q, k, v, expected);
}

std::vector<PackedCache::Step> PackedCache::steps(int batch, int tokens, const AttentionSpec& spec) const {
  auto held = this->tokens();
  held.resize(static_cast<std::size_t>(batch));  // of a first call
  const auto own = own_tokens(held, offset(), tokens, spec);
  std::vector<Step> steps;
  for (std::size_t b = 0; b < own.size(); ++b)
    steps.push_back({.first = static_cast<std::size_t>(held[b]),
                     .coded_before = sequences_.empty() ? 0 : sequences_[b].coded,
                     .skipped = static_cast<std::size_t>(tokens - own[b]),
                     .tokens = static_cast<std::size_t>(own[b])});
  return steps;
}

mx::array PackedCache::attend(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionSpec& spec) {
  const InUse in_use(busy_);
  check_shapes(q, k, v);
  const auto batch = static_cast<std::size_t>(k.shape(0)), kv_heads = static_cast<std::size_t>(k.shape(1)),
             tokens = static_cast<std::size_t>(k.shape(2)), dim = static_cast<std::size_t>(k.shape(3)), window = layer_->window(),
             sinks = layer_->sinks();
  const auto steps = this->steps(k.shape(0), k.shape(2), spec);
  const auto& codecs = layer_->codecs(*spec.rope);
  std::vector<int> positions;  // of the first token that comes, be it padding
  for (const auto& step : steps) positions.push_back(static_cast<int>(step.first) - static_cast<int>(step.skipped));
  const int group = q.shape(1) / k.shape(1);
  const auto by_token = [](const mx::array& x) { return mx::transpose(x, {0, 1, 3, 2, 4}); };
  const auto queries = as_floats(
                 by_token(mx::reshape((*spec.rope)(q, positions), {q.shape(0), k.shape(1), group, q.shape(2), q.shape(3)}))),
             values = as_floats(v), keys = as_floats(layer_->keys_before_rope() ? k : (*spec.rope)(k, positions));
  mx::eval({queries, keys, values});

  // Nothing is refused from here on.
  if (sequences_.empty()) sequences_.resize(batch);
  begin(kv_heads);
  offset_ += tokens;
  for (std::size_t b = 0; b < batch; ++b) {
    sequences_[b].tokens += steps[b].tokens;
    sequences_[b].coded = coded_of(sequences_[b]);
  }
  // What was in the window and what has come.
  std::vector<std::vector<float>> recent_keys(batch * kv_heads), recent_values(batch * kv_heads);
  parallel_for(batch * kv_heads, 1, [&](std::size_t i, std::size_t) {
    const std::size_t of_head = i % kv_heads;
    Sequence& sequence = sequences_[i / kv_heads];
    const auto& [first, coded_before, skipped, own] = steps[i / kv_heads];
    const std::size_t recent_begin = std::min(sinks + coded_before, sequence.tokens);
    const auto take = [&](Side which, const mx::array& from, PackedSide& side, std::vector<float>& recent) {
      const Quantizer& quantizer = layer_->exact(which);
      const std::span<const float> arrived(from.data<float>() + (i * tokens + skipped) * dim, own * dim);
      std::vector<std::uint8_t> encoded(quantizer.encoded_bytes(own));
      quantizer.encode(arrived, encoded);
      for (std::size_t p = recent_begin; p < first; ++p) {
        recent.resize(recent.size() + dim);
        side.exact.read(p, recent.data() + recent.size() - dim);
      }
      std::vector<float> rounded(arrived.begin(), arrived.end());
      if (window > 0) quantizer.decode(encoded, rounded);
      const std::size_t in_sinks = std::max(recent_begin, first) - first;
      recent.insert(recent.end(), rounded.begin() + static_cast<std::ptrdiff_t>(in_sinks * dim), rounded.end());
      side.exact.append(encoded.data(), first, own);
      if (const std::size_t leaving = sequence.coded - coded_before; leaving > 0)
        side.encode(codecs.of(which, of_head), std::span(recent).first(leaving * dim), coded_before);
      if (window == 0) recent.clear();
    };
    take(Side::kKeys, keys, sequence.heads[of_head].keys, recent_keys[i]);
    take(Side::kValues, values, sequence.heads[of_head].values, recent_values[i]);
  });

  std::vector<float> out(queries.size());
  Attention(*this, steps, spec, queries, out.data()).run(recent_keys, recent_values);
  return mx::astype(mx::reshape(by_token(mx::array(out.data(), queries.shape())), q.shape()), q.dtype());
}

int PackedCache::trim(int tokens) {
  const InUse in_use(busy_);
  const auto dropped = std::min(static_cast<std::size_t>(std::max(tokens, 0)), offset_);
  offset_ -= dropped;
  for (auto& sequence : sequences_) {
    sequence.tokens -= std::min(dropped, sequence.tokens);
    const std::size_t coded = std::min(sequence.coded, sequence.tokens > layer_->sinks() ? sequence.tokens - layer_->sinks() : 0);
    for (auto& [keys, values] : sequence.heads)
      for (auto* side : {&keys, &values}) side->trim(sequence.coded, coded);
    sequence.coded = coded;
  }
  return static_cast<int>(dropped);
}

std::unique_ptr<SavableCache> PackedCache::clone() const {
  const InUse in_use(busy_);
  auto copy = std::make_unique<PackedCache>(layer_);
  copy->sequences_ = sequences_;
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
