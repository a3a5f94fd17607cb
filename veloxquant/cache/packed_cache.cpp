#include "veloxquant/cache/packed_cache.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "veloxquant/core/error.h"
#include "veloxquant/core/parallel.h"
#include "veloxquant/kernels/rope.h"
#include "veloxquant/kernels/running_softmax.h"
#include "veloxquant/model/attention.h"

namespace veloxquant {

PackedLayer::PackedLayer(std::vector<QuantizerParameters> keys, std::vector<QuantizerParameters> values, int window, int sinks)
    : keys_(std::move(keys)),
      values_(std::move(values)),
      exact_keys_(make_quantizer(exact_parameters(Side::kKeys, keys_.at(0).dim))),
      exact_values_(make_quantizer(exact_parameters(Side::kValues, keys_.at(0).dim))),
      keys_before_rope_(quantizer_method(keys_.at(0).method).keys_before_rope),
      window_(static_cast<std::size_t>(window)),
      sinks_(static_cast<std::size_t>(sinks)) {
  for (const auto* side : {&keys_, &values_})
    for (const auto& unit : *side) check_packable(unit);
}

const PackedLayer::Codecs& PackedLayer::codecs(const Rope& rope) const {
  std::call_once(made_, [&] {
    rope_ = rope;
    for (const auto& unit : keys_) codecs_.keys.push_back(make_block_codec(unit, keys_before_rope_ ? &*rope_ : nullptr));
    for (const auto& unit : values_) codecs_.values.push_back(make_block_codec(unit, nullptr));
  });
  return codecs_;
}

namespace {

// 8-bit tokens of one side of one head: the sinks, and the last `window` in a ring.
class ExactStore {
 public:
  ExactStore(const Quantizer& quantizer, std::size_t window, std::size_t sinks)
      : quantizer_(quantizer),
        bytes_(quantizer.encoded_bytes(1)),
        window_(window),
        sinks_(sinks * bytes_),
        ring_(window * bytes_) {}

  // Tokens from position `first` on, bytes as they are encoded.
  void append(const std::uint8_t* encoded, std::size_t first, std::size_t tokens) {
    for (std::size_t t = 0; t < tokens; ++t, encoded += bytes_) {
      const std::size_t position = first + t;
      if (position * bytes_ < sinks_.size()) {
        std::copy_n(encoded, bytes_, sinks_.data() + position * bytes_);
      } else if (window_ > 0) {
        std::copy_n(encoded, bytes_, ring_.data() + position % window_ * bytes_);
      }
    }
  }

  void read(std::size_t position, float* vector) const {
    const bool sink = position * bytes_ < sinks_.size();
    const std::uint8_t* from = sink ? sinks_.data() + position * bytes_ : ring_.data() + position % window_ * bytes_;
    quantizer_.decode({from, bytes_}, {vector, static_cast<std::size_t>(quantizer_.dim())});
  }

  std::size_t nbytes() const { return sinks_.size() + ring_.size(); }

 private:
  const Quantizer& quantizer_;
  std::size_t bytes_, window_;
  std::vector<std::uint8_t> sinks_, ring_;
};

}  // namespace

// One KV head of one sequence.
struct PackedCache::Head {
  ExactStore exact_keys, exact_values;
  OpenBlock open_keys, open_values;
  const BlockCodec *keys, *values;
  std::vector<std::unique_ptr<std::uint8_t[]>> blocks;  // keys, then values

  Head(const PackedLayer& layer, const BlockCodec* keys, const BlockCodec* values)
      : exact_keys(layer.exact(Side::kKeys), layer.window(), layer.sinks()),
        exact_values(layer.exact(Side::kValues), layer.window(), layer.sinks()),
        keys(keys),
        values(values) {}

  std::size_t block_bytes() const { return keys->block_bytes() + values->block_bytes(); }
  std::uint8_t* values_of(std::size_t block) const { return blocks[block].get() + keys->block_bytes(); }

  // Tokens k and v [n, dim] as codes, the first of them the `index`-th coded token.
  void encode(std::span<const float> k, std::span<const float> v, std::size_t index, std::size_t dim) {
    for (std::size_t begin = 0, tokens = k.size() / dim; begin < tokens;) {
      const std::size_t at = (index + begin) % kPackedBlockTokens, count = std::min(kPackedBlockTokens - at, tokens - begin);
      if (at == 0) blocks.push_back(std::make_unique<std::uint8_t[]>(block_bytes()));
      keys->append(k.subspan(begin * dim, count * dim), at, blocks.back().get(), open_keys);
      values->append(v.subspan(begin * dim, count * dim), at, values_of(blocks.size() - 1), open_values);
      begin += count;
    }
  }
};

PackedCache::PackedCache(std::shared_ptr<const PackedLayer> layer) : layer_(std::move(layer)) {}
PackedCache::~PackedCache() = default;

std::size_t PackedCache::coded() const {
  const std::size_t exact = layer_->window() + layer_->sinks();
  return offset_ > exact ? offset_ - exact : 0;
}

std::size_t PackedCache::nbytes() const {
  std::size_t bytes = 0;
  for (const auto& head : heads_)
    bytes += head->exact_keys.nbytes() + head->exact_values.nbytes() + head->blocks.size() * head->block_bytes();
  return bytes;
}

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

// Queries at positions first … first + tokens − 1 over everything that is stored, in the order: codes, sinks, window.
class PackedCache::Attention {
 public:
  Attention(const PackedCache& cache, const AttentionSpec& spec, const float* q, std::size_t query_heads, std::size_t tokens,
            float* out)
      : cache_(cache),
        layer_(*cache.layer_),
        spec_(spec),
        q_(q),
        group_(query_heads / cache.kv_heads_),
        tokens_(tokens),
        rows_(group_ * tokens),
        dim_(cache.dim_),
        first_(cache.offset_ - tokens),
        out_(out) {}

  // recent: keys and values [positions from recent_begin, dim] of each head, not turned where they are stored so.
  void run(std::size_t recent_begin, const std::vector<std::vector<float>>& recent_keys,
           const std::vector<std::vector<float>>& recent_values) {
    const std::size_t heads = cache_.heads_.size(), blocks = cache_.heads_[0]->blocks.size(),
                      parts = std::min(blocks, std::max<std::size_t>(1, (kTasks + heads - 1) / heads));
    prepare(blocks);
    std::vector<Partial> partials(heads * (parts + 1));
    parallel_for(partials.size(), 1, [&](std::size_t i, std::size_t) {
      const std::size_t head = i / (parts + 1), part = i % (parts + 1);
      partials[i].begin(rows_, dim_);
      if (part == parts) {
        attend_exact(head, recent_begin, recent_keys[head], recent_values[head], partials[i]);
      } else {
        for (std::size_t block = blocks * part / parts; block < blocks * (part + 1) / parts; ++block)
          attend_block(head, block, partials[i]);
      }
    });
    parallel_for(heads, 1, [&](std::size_t head, std::size_t) { merge(head, {partials.data() + head * (parts + 1), parts + 1}); });
  }

 private:
  // Even out the threads, the same on every machine.
  static constexpr std::size_t kTasks = 16;

  std::size_t position(std::size_t row) const { return first_ + row % tokens_; }

  // Positions that a query sees, as far as attention goes.
  Range seen(std::size_t row) const {
    const std::size_t p = position(row), window = static_cast<std::size_t>(spec_.sliding_window);
    return {window > 0 && p + 1 > window ? p + 1 - window : 0, p + 1};
  }

  // Of the positions [begin, end): those that a query reads there.
  static Range within(Range seen, std::size_t begin, std::size_t end) {
    const std::size_t from = std::clamp(seen.begin, begin, end), to = std::clamp(seen.end, from, end);
    return {from - begin, to - begin};
  }

  // Scores become weights, those outside the rows' ranges zero.  Whether any row sees anything.
  template <class RangeOf>
  bool weigh(std::vector<float>& scores, std::size_t count, RangeOf range_of, Partial& partial) const {
    bool any = false;
    for (std::size_t row = 0; row < rows_; ++row) {
      float* of_row = scores.data() + row * count;
      const auto [from, to] = range_of(row);
      std::fill(of_row, of_row + from, 0.0f);
      std::fill(of_row + to, of_row + count, 0.0f);
      if (from == to) continue;
      any = true;
      const float shrink = running_softmax(of_row + from, to - from, spec_.soft_cap, partial.maximum[row], partial.sum[row]);
      if (shrink != 1.0f)
        for (std::size_t i = row * dim_; i < (row + 1) * dim_; ++i) partial.values[i] *= shrink;
    }
    return any;
  }

  void prepare(std::size_t blocks) {
    prepared_.resize(cache_.heads_.size());
    parallel_for(prepared_.size(), 1, [&](std::size_t head, std::size_t) {
      prepared_[head] = {queries(head), layer_.sinks(), blocks, {}, {}};
      cache_.heads_[head]->keys->prepare(prepared_[head]);
    });
  }

  BlockQueries queries(std::size_t head) const { return {q_ + head * rows_ * dim_, rows_, spec_.scale}; }

  void attend_block(std::size_t head, std::size_t block, Partial& partial) const {
    const Head& of = *cache_.heads_[head];
    const std::size_t first = block * kPackedBlockTokens, count = std::min(kPackedBlockTokens, cache_.coded() - first),
                      begin = layer_.sinks() + first;
    const auto range = [&](std::size_t row) {
      auto sees = seen(row);
      sees.end = sees.end > layer_.window() ? sees.end - layer_.window() : 0;  // the others are read from the window
      return within(sees, begin, begin + count);
    };
    const Range most = range(rows_ - 1);  // the last position sees most, but for a sliding window
    if (most.begin == most.end && spec_.sliding_window == 0) return;
    thread_local std::vector<float> scores;
    scores.resize(rows_ * count);
    of.keys->score(of.blocks[block].get(), count, begin, prepared_[head], scores.data(), count);
    if (weigh(scores, count, range, partial))
      of.values->add(of.values_of(block), count, scores.data(), rows_, count, partial.values.data());
  }

  // Sinks, then the window and the tokens that have just come.
  void attend_exact(std::size_t head, std::size_t recent_begin, const std::vector<float>& recent_keys,
                    const std::vector<float>& recent_values, Partial& partial) const {
    const std::size_t sinks = std::min(layer_.sinks(), cache_.offset_);
    std::vector<float> k(sinks * dim_), v(sinks * dim_);
    for (std::size_t p = 0; p < sinks; ++p) {
      cache_.heads_[head]->exact_keys.read(p, k.data() + p * dim_);
      cache_.heads_[head]->exact_values.read(p, v.data() + p * dim_);
    }
    attend_vectors(
        head, k, v, 0, [&](std::size_t row) { return within(seen(row), 0, sinks); }, partial);
    const std::size_t end = recent_begin + recent_keys.size() / dim_;
    attend_vectors(
        head, recent_keys, recent_values, recent_begin,
        [&](std::size_t row) {
          auto sees = seen(row);
          if (sees.end > layer_.window()) sees.begin = std::max(sees.begin, sees.end - layer_.window());
          return within(sees, recent_begin, end);
        },
        partial);
  }

  template <class RangeOf>
  void attend_vectors(std::size_t head, std::vector<float> k, const std::vector<float>& v, std::size_t begin, RangeOf range,
                      Partial& partial) const {
    const std::size_t count = k.size() / dim_;
    if (count == 0) return;
    const auto stride = static_cast<std::ptrdiff_t>(dim_);
    if (const Rope& rope = *spec_.rope; layer_.keys_before_rope() && !rope.frequencies().empty())
      veloxquant::rope({1, 1, count, dim_}, {k.data(), 0, 0, stride}, rope.frequencies(), rope.magnitude(),
                       static_cast<std::ptrdiff_t>(begin), {k.data(), 0, 0, stride});
    std::vector<float> scores(rows_ * count);
    score_vectors(queries(head), k.data(), count, dim_, dim_, scores.data(), count);
    if (weigh(scores, count, range, partial))
      add_vectors(scores.data(), rows_, count, v.data(), count, dim_, dim_, partial.values.data());
  }

  // The last part is of exact tokens, the others are sums in the space of the codes.
  void merge(std::size_t head, std::span<const Partial> parts) const {
    std::vector<float> coded(rows_ * dim_), coded_sums(rows_), totals(rows_), exact_weights(rows_);
    for (std::size_t row = 0; row < rows_; ++row) {
      float top = std::numeric_limits<float>::lowest();
      for (const auto& part : parts) top = std::max(top, part.maximum[row]);
      for (const auto& part : parts) {
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
    if (parts.size() > 1) cache_.heads_[head]->values->finish(coded, coded_sums);
    float* out = out_ + head * rows_ * dim_;
    for (std::size_t row = 0; row < rows_; ++row)
      for (std::size_t i = row * dim_; i < (row + 1) * dim_; ++i)
        out[i] = totals[row] > 0 ? (coded[i] + exact_weights[row] * parts.back().values[i]) / totals[row] : 0.0f;
  }

  const PackedCache& cache_;
  const PackedLayer& layer_;
  const AttentionSpec& spec_;
  const float* q_;
  std::size_t group_, tokens_, rows_, dim_, first_;
  float* out_;
  std::vector<PreparedQueries> prepared_;  // [heads]
};

namespace {

mx::array as_floats(const mx::array& x) {
  return mx::contiguous(mx::astype(x, mx::float32));
}

// Held while a cache is in use.
class InUse {
 public:
  explicit InUse(std::atomic<bool>& busy) : busy_(busy) {
    if (busy_.exchange(true)) throw std::logic_error("[packed cache] used from two threads at once");
  }
  ~InUse() { busy_ = false; }
  InUse(const InUse&) = delete;
  InUse& operator=(const InUse&) = delete;

 private:
  std::atomic<bool>& busy_;
};

}  // namespace

void PackedCache::begin(const mx::array& k, const PackedLayer::Codecs& codecs) {
  batch_ = static_cast<std::size_t>(k.shape(0));
  kv_heads_ = static_cast<std::size_t>(k.shape(1));
  dim_ = static_cast<std::size_t>(k.shape(3));
  for (const auto* side : {&codecs.keys, &codecs.values})
    if (side->size() != 1 && side->size() != kv_heads_)
      throw_invalid("packed cache", "expected keys of {} KV heads, got {}", side->size(), kv_heads_);
  if (layer_->exact(Side::kKeys).dim() != k.shape(3))
    throw_invalid("packed cache", "expected keys of {} dimensions, got {}", layer_->exact(Side::kKeys).dim(), k.shape(3));
  const auto of = [&](const auto& side, std::size_t head) { return side[side.size() == 1 ? 0 : head % kv_heads_].get(); };
  for (std::size_t i = 0; i < batch_ * kv_heads_; ++i)
    heads_.push_back(std::make_unique<Head>(*layer_, of(codecs.keys, i), of(codecs.values, i)));
}

mx::array PackedCache::attend(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionSpec& spec) {
  const InUse in_use(busy_);
  if (spec.padding) throw_invalid("packed cache", "padding: expected sequences without padding");
  if (heads_.empty()) begin(k, layer_->codecs(*spec.rope));
  const mx::Shape expected = {static_cast<int>(batch_), static_cast<int>(kv_heads_), k.shape(2), static_cast<int>(dim_)};
  if (k.shape() != expected || v.shape() != expected || q.shape(0) != k.shape(0) || q.shape(1) % k.shape(1) != 0 ||
      q.shape(2) != k.shape(2) || q.shape(3) != k.shape(3))
    throw_invalid("packed cache", "expected keys and values of shape [{}], got [{}] and [{}]", fmt::join(expected, ", "),
                  fmt::join(k.shape(), ", "), fmt::join(v.shape(), ", "));
  const int before = offset();
  const auto queries = as_floats((*spec.rope)(q, before)), values = as_floats(v),
             keys = as_floats(layer_->keys_before_rope() ? k : (*spec.rope)(k, before));
  mx::eval({queries, keys, values});

  const std::size_t tokens = static_cast<std::size_t>(k.shape(2)), window = layer_->window(), sinks = layer_->sinks(),
                    first = offset_, coded_before = coded();
  offset_ += tokens;
  // What was in the window and what has come: positions recent_begin … offset − 1.
  const std::size_t recent_begin = std::max(std::min(sinks, offset_), first > window ? first - window : 0);
  std::vector<std::vector<float>> recent_keys(heads_.size()), recent_values(heads_.size());
  const float *k_data = keys.data<float>(), *v_data = values.data<float>();
  parallel_for(heads_.size(), 1, [&](std::size_t i, std::size_t) {
    Head& head = *heads_[i];
    const auto take = [&](Side side, const float* from, ExactStore& exact, std::vector<float>& recent) {
      const Quantizer& quantizer = layer_->exact(side);
      const std::span<const float> arrived(from + i * tokens * dim_, tokens * dim_);
      std::vector<std::uint8_t> encoded(quantizer.encoded_bytes(tokens));
      quantizer.encode(arrived, encoded);
      for (std::size_t p = recent_begin; p < first; ++p) {
        recent.resize(recent.size() + dim_);
        exact.read(p, recent.data() + recent.size() - dim_);
      }
      std::vector<float> rounded(arrived.begin(), arrived.end());
      if (window > 0) quantizer.decode(encoded, rounded);
      const std::size_t skipped = std::max(recent_begin, first) - first;
      recent.insert(recent.end(), rounded.begin() + static_cast<std::ptrdiff_t>(skipped * dim_), rounded.end());
      exact.append(encoded.data(), first, tokens);
    };
    take(Side::kKeys, k_data, head.exact_keys, recent_keys[i]);
    take(Side::kValues, v_data, head.exact_values, recent_values[i]);
    const std::size_t leaving = coded() - coded_before;
    if (leaving > 0) {
      const std::size_t at = (sinks + coded_before - recent_begin) * dim_;
      head.encode(std::span(recent_keys[i]).subspan(at, leaving * dim_), std::span(recent_values[i]).subspan(at, leaving * dim_),
                  coded_before, dim_);
    }
    if (window == 0) recent_keys[i].clear(), recent_values[i].clear();
  });

  std::vector<float> out(queries.size());
  Attention(*this, spec, queries.data<float>(), static_cast<std::size_t>(q.shape(1)), tokens, out.data())
      .run(recent_begin, recent_keys, recent_values);
  return mx::astype(mx::array(out.data(), q.shape()), q.dtype());
}

CacheFactory packed_factory(const Plan& plan) {
  struct Units {
    std::vector<QuantizerParameters> keys, values;
  };
  std::vector<Units> units(static_cast<std::size_t>(plan.model.num_layers));
  for (const auto& unit : plan.units) {
    auto& [keys, values] = units.at(static_cast<std::size_t>(unit.layer));
    (unit.side == Side::kKeys ? keys : values).push_back(unit.quantizer);
  }
  std::vector<std::shared_ptr<const PackedLayer>> layers;  // null: the layer slides
  for (auto& [keys, values] : units)
    layers.push_back(
        keys.empty() ? nullptr : std::make_shared<const PackedLayer>(std::move(keys), std::move(values), plan.window, plan.sinks));
  return [layers = std::move(layers)](int layer) -> std::unique_ptr<AttentionCache> {
    const auto& packed = layers.at(static_cast<std::size_t>(layer));
    if (!packed) return std::make_unique<FullCache>();
    return std::make_unique<PackedCache>(packed);
  };
}

}  // namespace veloxquant
