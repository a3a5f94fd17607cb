#include "veloxquant/cache/packed_arrays.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "mlx/ops.h"
#include "veloxquant/cache/packed_head.h"
#include "veloxquant/core/error.h"
#include "veloxquant/model/array_entry.h"
#include "veloxquant/plan/plan.h"

namespace veloxquant {
namespace {

constexpr int kBlock = static_cast<int>(kPackedBlockTokens);
constexpr int kStretch = 8;             // blocks that are read at a time
constexpr int kMostQueries = 512;       // tokens whose queries are handled at a time: more would see few codes that all see
constexpr int kScoresAtOnce = 1 << 25;  // of those, over a stretch
constexpr float kLowest = -1e30f;       // finite, so that differences of two are numbers
constexpr int kKeys = 0, kValues = 1;   // of the axis of both

mx::array joined(const std::vector<mx::array>& parts, int axis) {
  return parts.size() == 1 ? parts[0] : mx::concatenate(parts, axis);
}

// One side of [B, H, 2, n, D].
mx::array side_of(const mx::array& vectors, int side) {
  return mx::squeeze(part(vectors, 2, side, side + 1), 2);
}

// Rows [B, blocks, …] → `size` elements from `begin` on of each of `heads` that stand `stride` apart: [B, heads, blocks, size].
mx::array of_heads(const mx::array& rows, int begin, int stride, int heads, int offset, int size) {
  const auto all = mx::reshape(part(rows, 2, begin, begin + heads * stride), {rows.shape(0), rows.shape(1), heads, stride});
  return mx::swapaxes(part(all, 3, offset, offset + size), 1, 2);
}

// Elements of keys and of values, [B · heads · blocks, …], as rows have them: [B, blocks, heads · …].
mx::array as_rows(const mx::array& keys, const mx::array& values, int batch, int heads) {
  // A side without patches has lost nothing, and a GPU need not copy nothing.
  const auto both = keys.shape(-1) == 0 ? values : values.shape(-1) == 0 ? keys : mx::concatenate({keys, values}, -1);
  const int size = both.shape(-1), blocks = both.shape(0) / (batch * heads);
  return mx::reshape(mx::swapaxes(mx::reshape(both, {batch, heads, blocks, size}), 1, 2), {batch, blocks, heads * size});
}

// Elements from `at` on, and then zeros up to `length`.
struct Piece {
  int at, size, length;
};

// Pieces of rows [B, n, …], one after another.
mx::array pieced(const mx::array& rows, const std::vector<Piece>& pieces) {
  std::vector<mx::array> parts;
  for (const auto& [at, size, length] : pieces) {
    if (size > 0) parts.push_back(part(rows, 2, at, at + size));
    if (length > size) parts.push_back(mx::zeros({rows.shape(0), rows.shape(1), length - size}, rows.dtype()));
  }
  return joined(parts, 2);
}

// Which keys the queries see: those before `ends`, of each query, that lie less than `reach` behind them.
mx::array seen_keys(const mx::array& query_positions, const mx::array& ends, const mx::array& key_positions,
                    const mx::array& reach) {
  return mx::logical_and(mx::less(key_positions, ends), mx::less(mx::subtract(query_positions, key_positions), reach));
}

const GraphCodec& unit(const std::vector<GraphCodec>& side, int head) {
  return side[side.size() == 1 ? 0 : static_cast<std::size_t>(head)];
}

int reach_of(const AttentionSpec& spec) {
  return spec.sliding_window > 0 ? spec.sliding_window : std::numeric_limits<int>::max();
}

}  // namespace

PackedArraysLayer::PackedArraysLayer(const std::vector<QuantizerParameters>& keys, const std::vector<QuantizerParameters>& values,
                                     int window, int sinks)
    : keys(keys.begin(), keys.end()),
      values(values.begin(), values.end()),
      dim(keys.at(0).dim),
      window(window),
      sinks(sinks),
      keys_before_rope(quantizer_method(keys.at(0).method).keys_before_rope),
      key_parameters_(keys),
      value_parameters_(values) {
  const auto parameters = exact_parameters(Side::kKeys, dim);
  exact = method_graph(parameters, make_quantizer(parameters));
  if (cuda_refusal().empty()) make_units();  // by as many threads as make layers
}

void PackedArraysLayer::make_units() const {
  key_units_.emplace(key_parameters_), value_units_.emplace(value_parameters_);
}

const PackedKernels* PackedArraysLayer::kernels(const Rope& rope, int kv_heads) const {
  std::call_once(made_, [&] {
    refusal_ = cuda_refusal();
    if (!refusal_.empty()) return;
    if (!key_units_) make_units();
    auto made = PackedKernels::make(*key_units_, *value_units_, kv_heads, window, sinks, rope);
    if (auto* why = std::get_if<std::string>(&made))
      refusal_ = std::move(*why);
    else
      kernels_ = std::move(std::get<0>(made));
    key_units_.reset(), value_units_.reset();
    key_parameters_.clear(), value_parameters_.clear();
  });
  return kernels_ && kernels_->kv_heads() == kv_heads ? kernels_.get() : nullptr;
}

PackedArrays::PackedArrays(std::shared_ptr<const PackedArraysLayer> layer) : layer_(std::move(layer)) {}

StateSizes PackedArraysLayer::state_sizes(int kv_heads) const {
  check_units(kv_heads, keys.size(), values.size());
  StateSizes sizes{.heads = kv_heads,
                   .block_bytes = 0,
                   .patches = 0,
                   .sinks = sinks,
                   .window = window,
                   .token_bytes = packed_bytes(exact.layout)};
  for (const auto* side : {&keys, &values})
    for (int head = 0; head < kv_heads; ++head) {
      const GraphCodec& codec = unit(*side, head);
      sizes.block_bytes += codec.filled_bytes();
      sizes.patches = std::max(sizes.patches, codec.patches());
    }
  return sizes;
}

std::vector<int> PackedArrays::tokens() const {
  std::vector<int> tokens(static_cast<std::size_t>(batch_), offset_);
  for (std::size_t b = 0; b < sequences_.size(); ++b) tokens[b] = sequences_[b].offset_;
  return tokens;
}

std::vector<mx::array> PackedArrays::pending() const {
  std::vector<mx::array> arrays;
  for (const auto& sequence : sequences_) {
    const auto more = sequence.pending();
    arrays.insert(arrays.end(), more.begin(), more.end());
  }
  if (!sequences_.empty()) return arrays;
  for (const auto* array : {&closed_, &open_, &errors_, &exact_})
    if (*array) arrays.push_back(**array);
  return arrays;
}

std::size_t PackedArrays::nbytes() const {
  std::size_t bytes = 0;
  for (const auto& array : pending()) bytes += array.nbytes();
  return bytes;
}

void PackedArrays::set_up(int batch, int kv_heads) {
  batch_ = batch;
  kv_heads_ = kv_heads;
  const int alike = layer_->keys.size() == 1 && layer_->values.size() == 1 ? kv_heads_ : 1;
  int bytes = 0, errors = 0;
  for (int head = 0; head < kv_heads_; head += alike) {
    const auto& some =
        heads_.emplace_back(Heads{head, alike, &unit(layer_->keys, head), &unit(layer_->values, head), bytes, errors});
    bytes += alike * some.bytes_of_one();
    errors += alike * some.errors_of_one();
  }
  open_ = mx::zeros({batch_, 1, bytes}, mx::uint8);
  if (errors > 0) errors_ = mx::zeros({batch_, 1, errors});
  if (const int places = layer_->sinks + layer_->window; places > 0)
    exact_ = mx::zeros({batch_, kv_heads_, 2, places, packed_bytes(layer_->exact.layout)}, mx::uint8);
}

mx::array PackedArrays::attend(const mx::array& q, const mx::array& k, const mx::array& v, const AttentionSpec& spec) {
  const InUse in_use(busy_);
  // A call that is refused changes nothing.
  const int batch = batch_ > 0 ? batch_ : k.shape(0), kv_heads = heads_.empty() ? k.shape(1) : kv_heads_;
  if (heads_.empty()) check_units(k, layer_->keys.size(), layer_->values.size(), layer_->dim);
  check_chunk(q, k, v, {batch, kv_heads, k.shape(2), layer_->dim});
  const auto held = batch_ > 0 ? this->tokens() : std::vector<int>(static_cast<std::size_t>(batch), 0);
  const auto own = own_tokens(held, offset_, k.shape(2), spec);
  if (heads_.empty()) set_up(batch, kv_heads);
  if (!sequences_.empty() || std::ranges::any_of(own, [&](int count) { return count < k.shape(2); }))
    return attend_apart(q, k, v, own, spec);
  const int first = offset_, coded_before = coded_, tokens = k.shape(2), group = q.shape(1) / kv_heads_, dim = layer_->dim;
  const auto as_floats = [](const mx::array& x) { return mx::astype(x, mx::float32); };
  const auto keys = as_floats(layer_->keys_before_rope ? k : (*spec.rope)(k, first)), values = as_floats(v);
  if (const auto* kernels = layer_->kernels(*spec.rope, kv_heads_)) {
    const auto turned = as_floats((*spec.rope)(q, first));
    const auto out = tokens == 1 ? attend_one(*kernels, turned, keys, values, spec) : attend_many(*kernels, turned, keys, values, spec);
    return mx::astype(out, q.dtype());
  }
  const auto queries =
      mx::reshape(mx::multiply(as_floats((*spec.rope)(q, first)), mx::array(spec.scale)), {batch_, kv_heads_, group, tokens, dim});
  const Recent recent = append(keys, values);

  const int step = std::clamp(kScoresAtOnce / (kStretch * kBlock * batch_ * kv_heads_ * group), 1, kMostQueries);
  std::vector<mx::array> results;
  for (int begin = 0; begin < tokens; begin += step) {
    const int count = std::min(step, tokens - begin), rows = group * count;
    std::vector<int> positions(static_cast<std::size_t>(rows));
    for (int row = 0; row < rows; ++row) positions[static_cast<std::size_t>(row)] = first + begin + row % count;
    const Queries some{mx::reshape(part(queries, 3, begin, begin + count), {batch_, kv_heads_, rows, dim}), first + begin, count,
                       mx::reshape(int_array(positions), {rows, 1}), coded_before};
    auto sums = attend_coded(some, spec);
    if (const auto exact = attend_exact(some, recent, spec); exact && sums) {
      const auto maximum = mx::maximum(sums->maximum, exact->maximum);
      const auto coded_weight = mx::exp(mx::subtract(sums->maximum, maximum)),
                 exact_weight = mx::exp(mx::subtract(exact->maximum, maximum));
      const auto both = [&](const mx::array& coded, const mx::array& exact) {
        return mx::add(mx::multiply(coded, coded_weight), mx::multiply(exact, exact_weight));
      };
      sums = Partial{both(sums->sums, exact->sums), maximum, both(sums->total, exact->total)};
    } else if (exact) {
      sums = exact;
    }
    results.push_back(mx::reshape(mx::divide(sums->sums, sums->total), {batch_, kv_heads_ * group, count, dim}));
  }
  // Otherwise what is stored would wait as a graph that grows.
  return mx::depends({mx::astype(joined(results, 2), q.dtype())}, pending())[0];
}

// Positions sinks ≤ begin ≤ p < end of the window, in their order.
mx::array PackedArrays::exact_bytes(int begin, int end) const {
  const int sinks = layer_->sinks, window = layer_->window, from = sinks + begin % window, to = from + end - begin,
            most = sinks + window;
  if (to <= most) return part(*exact_, 3, from, to);
  return mx::concatenate({part(*exact_, 3, from, most), part(*exact_, 3, sinks, to - window)}, 3);
}

// Positions begin ≤ p < end, all sinks or all of one round of the window, out of bytes that begin at `first`.
void PackedArrays::store_exact(const mx::array& bytes, int first, int begin, int end) {
  if (begin >= end) return;
  const int place = begin < layer_->sinks ? begin : layer_->sinks + begin % layer_->window;
  mx::Shape start(5, 0), stop = exact_->shape();
  start[3] = place;
  stop[3] = place + end - begin;
  exact_ = mx::slice_update(*exact_, part(bytes, 3, begin - first, end - first), start, stop);
}

// How many tokens are codes once there are `offset`.
int PackedArrays::coded_at(int offset) const {
  return std::max(coded_, offset - layer_->window - layer_->sinks);
}

// What is stored comes out of the kernels that attention reads from: evaluating one evaluates the other.
mx::array PackedArrays::attend_one(const PackedKernels& kernels, const mx::array& q, const mx::array& k, const mx::array& v,
                                   const AttentionSpec& spec) {
  const PackedKernels::Counts before{coded_, offset_}, after{coded_at(offset_ + 1), offset_ + 1};
  const auto state = kernels.append({exact_, *open_, errors_}, k, v, before, after);
  exact_ = state.exact, open_ = state.open, errors_ = state.errors;
  coded_ = after.coded, offset_ = after.offset;
  if (coded_ > before.coded && coded_ % kBlock == 0) closed_ = closed_ ? mx::concatenate({*closed_, *open_}, 1) : *open_;
  return kernels.attend(q, closed_, state, after, spec);
}

mx::array PackedArrays::attend_many(const PackedKernels& kernels, const mx::array& q, const mx::array& k, const mx::array& v,
                                    const AttentionSpec& spec) {
  const int tokens = k.shape(2), first = offset_, sinks = layer_->sinks;
  const PackedKernels::Counts before{coded_, first}, after{coded_at(first + tokens), first + tokens};
  const auto rounded = kernels.round(exact_, k, v, before, after);
  exact_ = rounded.exact;
  coded_ = after.coded, offset_ = after.offset;
  if (coded_ > before.coded) {
    const auto [blocks, errors] = kernels.encode({exact_, *open_, errors_}, rounded, before, after);
    if (errors) errors_ = errors;
    const int whole = coded_ / kBlock - before.coded / kBlock;
    if (whole > 0) {
      const auto some = part(blocks, 1, 0, whole);
      closed_ = closed_ ? mx::concatenate({*closed_, some}, 1) : some;
    }
    open_ = coded_ % kBlock > 0 ? part(blocks, 1, whole, whole + 1) : mx::zeros_like(*open_);
  }
  // Codes that some query sees, from the begin of a block on.
  const int end = std::min(coded_, std::max(before.coded, after.offset - layer_->window - sinks)),
            begin = spec.sliding_window > 0 ? std::max(0, first + 1 - spec.sliding_window - sinks) / kBlock * kBlock : 0;
  const auto out = kernels.attend_many(q, closed_, *open_, rounded, begin, std::max(0, end - begin), before, after, spec);
  return mx::depends({out}, pending())[0];
}

PackedArrays::Recent PackedArrays::append(const mx::array& k, const mx::array& v) {
  const int tokens = k.shape(2), window = layer_->window, sinks = layer_->sinks, first = offset_, end = first + tokens,
            coded_before = coded_;
  offset_ = end;
  coded_ = coded_at(end);
  const auto arrived = mx::stack({k, v}, 2), bytes = layer_->exact.encode(arrived);
  const int begin = std::min(sinks + coded_before, end), skipped = std::max(begin, first) - first;
  Recent recent{begin, part(arrived, 3, skipped, tokens)};
  if (window > 0) {
    auto all = part(bytes, 3, skipped, tokens);
    if (begin < first) all = mx::concatenate({exact_bytes(begin, first), all}, 3);
    recent.vectors = layer_->exact.decode(all);
  }
  store_exact(bytes, first, first, std::min(sinks, end));
  if (window > 0)
    for (int p = std::max({first, sinks, end - window}); p < end;) {
      const int next = std::min(end, (p / window + 1) * window);
      store_exact(bytes, first, p, next);
      p = next;
    }
  if (const int leaving = coded_ - coded_before; leaving > 0) append_coded(part(recent.vectors, 3, 0, leaving), coded_before);
  return recent;
}

// Tokens [B, H, 2, n, D], the first of them the `index`-th coded one: what fits into the open block, whole blocks, the rest.
void PackedArrays::append_coded(const mx::array& vectors, int index) {
  for (int begin = 0, tokens = vectors.shape(3); begin < tokens;) {
    const int at = (index + begin) % kBlock, left = tokens - begin, whole = at == 0 ? left / kBlock : 0,
              count = whole > 0 ? whole * kBlock : std::min(kBlock - at, left);
    const auto grown = encode(part(vectors, 3, begin, begin + count), at, std::max(1, whole));
    if (at + count >= kBlock) {
      closed_ = closed_ ? mx::concatenate({*closed_, grown.bytes}, 1) : grown.bytes;
      open_ = mx::zeros_like(*open_);
    } else {
      open_ = grown.bytes;
    }
    if (errors_) errors_ = part(grown.errors, 1, grown.errors.shape(1) - 1, grown.errors.shape(1));
    begin += count;
  }
}

template <class Each>
void PackedArrays::each_unit(const Each& each) const {
  for (const auto& some : heads_)
    for (int i = 0; i < some.count; ++i) {
      const int byte = some.bytes + i * some.bytes_of_one(), error = some.errors + i * some.errors_of_one();
      each(*some.keys, byte, error);
      each(*some.values, byte + some.keys->block_bytes(), error + some.keys->patches());
    }
}

template <class Make>
GraphCodec::Blocks PackedArrays::rows_of(const Make& make) const {
  std::vector<mx::array> bytes, errors;
  for (const auto& some : heads_) {
    const auto keys = make(some, kKeys, *some.keys, 0, 0),
               values = make(some, kValues, *some.values, some.keys->block_bytes(), some.keys->patches());
    bytes.push_back(as_rows(keys.bytes, values.bytes, batch_, some.count));
    if (errors_) errors.push_back(as_rows(keys.errors, values.errors, batch_, some.count));
  }
  return {joined(bytes, 2), errors_ ? joined(errors, 2) : *open_};
}

// Of one block [B, 1, …], those of a codec: [B · heads, …].
mx::array PackedArrays::bytes_of(const Heads& some, const mx::array& block, int byte, const GraphCodec& codec) const {
  return mx::reshape(of_heads(block, some.bytes, some.bytes_of_one(), some.count, byte, codec.block_bytes()),
                     {batch_ * some.count, codec.block_bytes()});
}

mx::array PackedArrays::errors_of(const Heads& some, int error, const GraphCodec& codec) const {
  return mx::reshape(of_heads(*errors_, some.errors, some.errors_of_one(), some.count, error, codec.patches()),
                     {batch_ * some.count, codec.patches()});
}

// Vectors [B, H, 2, blocks · n, D] as tokens at … at + n − 1 of blocks: of the open one, or of `blocks` new ones.  Rows [B, blocks,
// …] as closed_ and errors_ have them.
GraphCodec::Blocks PackedArrays::encode(const mx::array& vectors, int at, int blocks) const {
  const int tokens = vectors.shape(3) / blocks;
  return rows_of([&](const Heads& some, int side, const GraphCodec& codec, int byte, int error) {
    const auto x = side_of(part(vectors, 1, some.first, some.first + some.count), side);
    GraphCodec::Blocks held{*open_, *open_};
    if (at > 0) {
      held.bytes = bytes_of(some, *open_, byte, codec);
      if (codec.patches() > 0) held.errors = errors_of(some, error, codec);
    }
    return codec.append(held, at, mx::reshape(x, {batch_ * some.count * blocks, tokens, layer_->dim}));
  });
}

mx::array PackedArrays::blocks(int begin, int end) const {
  const int closed = closed_ ? closed_->shape(1) : 0;
  std::vector<mx::array> parts;
  if (begin < closed) parts.push_back(part(*closed_, 1, begin, std::min(end, closed)));
  if (end > closed) parts.push_back(*open_);
  return joined(parts, 1);
}

mx::array PackedArrays::turned(const mx::array& keys, int position, const AttentionSpec& spec) const {
  return layer_->keys_before_rope ? (*spec.rope)(keys, position) : keys;
}

void PackedArrays::extend(std::optional<Partial>& partial, const Queries& queries, const mx::array& k, const mx::array& v,
                          const std::optional<mx::array>& seen, float soft_cap) {
  auto scores = mx::matmul(queries.q, mx::swapaxes(k, -1, -2));
  if (soft_cap > 0) scores = mx::multiply(mx::tanh(mx::divide(scores, mx::array(soft_cap))), mx::array(soft_cap));
  if (seen) scores = mx::where(*seen, scores, mx::array(kLowest));
  auto maximum = mx::max(scores, -1, true);
  if (partial) maximum = mx::maximum(maximum, partial->maximum);
  auto weights = mx::exp(mx::subtract(scores, maximum));
  if (seen) weights = mx::where(*seen, weights, mx::array(0.0f));  // of a query that sees none of them, they are 1
  Partial now{mx::matmul(weights, v), maximum, mx::sum(weights, -1, true)};
  if (partial) {
    const auto shrink = mx::exp(mx::subtract(partial->maximum, maximum));
    now.sums = mx::add(now.sums, mx::multiply(partial->sums, shrink));
    now.total = mx::add(now.total, mx::multiply(partial->total, shrink));
  }
  partial = now;
}

std::optional<PackedArrays::Partial> PackedArrays::attend_coded(const Queries& queries, const AttentionSpec& spec) const {
  const int window = layer_->window, sinks = layer_->sinks, reach = reach_of(spec);
  // Coded tokens that some query sees, from the begin of a block on.
  const int all_see = std::max(queries.coded, queries.first + 1 - window - sinks),
            end = std::min(coded_, std::max(queries.coded, queries.first + queries.tokens - window - sinks)),
            begin = spec.sliding_window > 0 ? std::max(0, queries.first + 1 - reach - sinks) / kBlock * kBlock : 0;
  std::optional<Partial> partial;
  for (int from = begin; from < end; from += kStretch * kBlock) {
    const int tokens = std::min(kStretch * kBlock, end - from), position = sinks + from;
    const auto rows = blocks(from / kBlock, (from + tokens + kBlock - 1) / kBlock);
    std::vector<mx::array> keys, values;
    for (const auto& some : heads_) {
      const auto bytes = [&](int offset, int size) {
        return mx::reshape(of_heads(rows, some.bytes, some.bytes_of_one(), some.count, offset, size),
                           {batch_ * some.count, rows.shape(1), size});
      };
      const auto by_heads = [&](const mx::array& x) { return mx::reshape(x, {batch_, some.count, tokens, layer_->dim}); };
      const int key_bytes = some.keys->block_bytes();
      keys.push_back(by_heads(some.keys->decode(bytes(0, key_bytes), tokens)));
      values.push_back(by_heads(some.values->look_up(bytes(key_bytes, some.values->block_bytes()), tokens)));
    }
    std::optional<mx::array> seen;
    if (from + tokens > all_see || spec.sliding_window > 0) {
      const auto ends = mx::maximum(mx::add(queries.positions, mx::array(1 - window)), mx::array(sinks + queries.coded));
      seen = seen_keys(queries.positions, ends, mx::arange(position, position + tokens), mx::array(reach));
    }
    extend(partial, queries, turned(joined(keys, 1), position, spec), joined(values, 1), seen, spec.soft_cap);
  }
  if (!partial) return partial;
  std::vector<mx::array> sums;
  for (const auto& some : heads_) {
    const auto of = [&](const mx::array& x) { return part(x, 1, some.first, some.first + some.count); };
    sums.push_back(some.values->back(of(partial->sums), of(partial->total)));
  }
  partial->sums = joined(sums, 1);
  return partial;
}

std::optional<PackedArrays::Partial> PackedArrays::attend_exact(const Queries& queries, const Recent& recent,
                                                                const AttentionSpec& spec) const {
  const int window = layer_->window, reach = reach_of(spec), end = queries.first + queries.tokens,
            sinks = std::min(layer_->sinks, end), begin = std::max(recent.begin, queries.first + 1 - window);
  std::vector<mx::array> keys, values;
  std::vector<int> positions, reaches;
  const auto add = [&](const mx::array& vectors, int from, int to, int reach) {
    keys.push_back(turned(side_of(vectors, kKeys), from, spec));
    values.push_back(side_of(vectors, kValues));
    for (int p = from; p < to; ++p) positions.push_back(p), reaches.push_back(reach);
  };
  if (sinks > 0) add(layer_->exact.decode(part(*exact_, 3, 0, sinks)), 0, sinks, reach);
  if (window > 0 && begin < end)
    add(part(recent.vectors, 3, begin - recent.begin, end - recent.begin), begin, end, std::min(reach, window));
  std::optional<Partial> partial;
  if (keys.empty()) return partial;
  std::optional<mx::array> seen;
  if (queries.tokens > 1 || spec.sliding_window > 0)
    seen = seen_keys(queries.positions, mx::add(queries.positions, mx::array(1)), int_array(positions), int_array(reaches));
  extend(partial, queries, joined(keys, 2), joined(values, 2), seen, spec.soft_cap);
  return partial;
}

mx::array PackedArrays::attend_apart(const mx::array& q, const mx::array& k, const mx::array& v, const std::vector<int>& own,
                                     const AttentionSpec& spec) {
  if (sequences_.empty()) {
    std::vector<PackedArrays> sequences;
    for (int b = 0; b < batch_; ++b) sequences.push_back(sequence(b));
    sequences_ = std::move(sequences);
    for (auto* array : {&closed_, &open_, &errors_, &exact_}) array->reset();
    coded_ = 0;
  }
  AttentionSpec alone = spec;
  alone.padding.reset();
  const int tokens = k.shape(2);
  std::vector<mx::array> results;
  for (int b = 0; b < batch_; ++b) {
    const int skipped = tokens - own[static_cast<std::size_t>(b)];
    const auto of = [&](const mx::array& x) { return part(part(x, 0, b, b + 1), 2, skipped, tokens); };
    // A query that is padding gives zeros.
    std::vector<mx::array> parts;
    if (skipped > 0) parts.push_back(mx::zeros({1, q.shape(1), skipped, q.shape(3)}, q.dtype()));
    if (skipped < tokens) parts.push_back(sequences_[static_cast<std::size_t>(b)].attend(of(q), of(k), of(v), alone));
    results.push_back(joined(parts, 2));
  }
  offset_ += tokens;
  return joined(results, 0);
}

PackedArrays PackedArrays::sequence(int index) const {
  PackedArrays one = *this;
  one.batch_ = 1;
  for (auto* array : {&one.closed_, &one.open_, &one.errors_, &one.exact_})
    if (*array) *array = part(**array, 0, index, index + 1);
  return one;
}

int PackedArrays::trim(int tokens) {
  const InUse in_use(busy_);
  const int dropped = std::clamp(tokens, 0, offset_);
  offset_ -= dropped;
  for (auto& sequence : sequences_) sequence.trim(dropped);
  keep_coded(std::min(coded_, std::max(0, offset_ - layer_->sinks)));
  return dropped;
}

void PackedArrays::keep_coded(int kept) {
  if (kept == coded_) return;
  const auto in_last_block = [](int coded) { return static_cast<int>(tokens_in_last_block(static_cast<std::size_t>(coded))); };
  const bool reopened = blocks_of(kept) < blocks_of(coded_);
  const int held = reopened ? kBlock : in_last_block(coded_), last = blocks_of(kept) - 1, tokens = in_last_block(kept);
  if (kept > 0) {
    GraphCodec::Blocks cut{blocks(last, last + 1), *open_};
    if (errors_) {
      cut = rows_of([&](const Heads& some, int, const GraphCodec& codec, int byte, int error) {
        std::optional<mx::array> errors;
        if (!reopened && codec.patches() > 0) errors = errors_of(some, error, codec);
        return codec.trim(bytes_of(some, cut.bytes, byte, codec), errors, held, tokens);
      });
      errors_ = cut.errors;
    }
    open_ = cut.bytes;
  }
  const int whole = kept / kBlock;
  if (kept % kBlock == 0) open_ = mx::zeros_like(*open_);
  if (whole > 0)
    closed_ = part(*closed_, 1, 0, whole);
  else
    closed_.reset();
  coded_ = kept;
}

std::unique_ptr<SavableCache> PackedArrays::clone() const {
  const InUse in_use(busy_);
  return std::make_unique<PackedArrays>(*this);
}

CacheState PackedArrays::state() const {
  const InUse in_use(busy_);
  if (!sequences_.empty()) {
    std::vector<CacheState> states;
    for (const auto& sequence : sequences_) states.push_back(sequence.state());
    auto state = join_sequences(states);
    state.insert_or_assign("offset", mx::array(offset_));
    return state;
  }
  StateCounts counts{.offset = offset_, .tokens = tokens(), .coded = {}};
  if (heads_.empty()) return counting_state(counts);
  counts.coded.assign(counts.tokens.size(), coded_);
  const auto sizes = layer_->state_sizes(kv_heads_);
  auto state = blank_state(counts, sizes);
  std::vector<Piece> bytes, errors;
  each_unit([&](const GraphCodec& codec, int byte, int error) {
    bytes.push_back({byte, codec.filled_bytes(), codec.filled_bytes()});
    errors.push_back({error, codec.patches(), sizes.patches});
  });
  const auto set = [&](const char* name, const mx::array& array) {
    auto& held = state.at(name);
    if (held.size() > 0) held = on_cpu(mx::reshape(array, held.shape()));
  };
  if (coded_ > 0) set("blocks", pieced(blocks(0, blocks_of(coded_)), bytes));
  if (errors_ && coded_ > 0) set("patch_errors", pieced(*errors_, errors));
  if (exact_) {
    set("sinks", part(*exact_, 3, 0, sizes.sinks));
    set("window", part(*exact_, 3, sizes.sinks, sizes.sinks + sizes.window));
  }
  return state;
}

void PackedArrays::restore(const CacheState& state) {
  const InUse in_use(busy_);
  StateSizes sizes{};
  const auto counts = check_state(state, [&](int heads) { return sizes = layer_->state_sizes(heads); });
  const auto& [offset, tokens, coded] = counts;
  PackedArrays restored(layer_);
  restored.offset_ = offset;
  restored.batch_ = static_cast<int>(tokens.size());
  if (sizes.heads > 0) restored.set_up(restored.batch_, sizes.heads);
  const auto all = [](const std::vector<int>& counts, int count) {
    return std::ranges::all_of(counts, [&](int other) { return other == count; });
  };
  if (!all(tokens, offset) || (!coded.empty() && !all(coded, coded[0]))) {
    for (int b = 0; b < restored.batch_; ++b) {
      restored.sequences_.emplace_back(layer_);
      restored.sequences_.back().restore(select_sequences(state, {b}));
    }
  } else if (!coded.empty()) {
    restored.take(state, sizes.patches, coded[0]);
  }
  *this = std::move(restored);
}

void PackedArrays::take(const CacheState& state, int patches, int coded) {
  coded_ = coded;
  std::vector<Piece> bytes, errors;
  int at = 0;
  each_unit([&](const GraphCodec& codec, int, int) {
    bytes.push_back({at, codec.filled_bytes(), codec.block_bytes()});
    errors.push_back({static_cast<int>(errors.size()) * patches, codec.patches(), codec.patches()});
    at += codec.filled_bytes();
  });
  if (coded > 0) {
    const auto rows = pieced(state.at("blocks"), bytes);
    const int whole = coded / kBlock;
    if (whole > 0) closed_ = part(rows, 1, 0, whole);
    if (coded % kBlock > 0) open_ = part(rows, 1, whole, whole + 1);
  }
  if (errors_) errors_ = pieced(mx::reshape(state.at("patch_errors"), {batch_, 1, -1}), errors);
  if (exact_) {
    std::vector<mx::array> parts;
    for (const char* name : {"sinks", "window"})
      if (const auto& held = state.at(name); held.size() > 0) parts.push_back(held);
    exact_ = joined(parts, 3);
  }
}

}  // namespace veloxquant
