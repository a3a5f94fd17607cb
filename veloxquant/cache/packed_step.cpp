#include "veloxquant/cache/packed_step.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <stdexcept>

#include "veloxquant/core/fetch.h"
#include "veloxquant/core/parallel.h"
#include "veloxquant/kernels/rope.h"
#include "veloxquant/kernels/running_softmax.h"
#include "veloxquant/model/cpu_operation.h"

namespace veloxquant {
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

// In two sweeps over the threads: what has come is stored, and queries are prepared; then they see what is stored, in the order
// codes, sinks, window.
class PackedStep {
 public:
  PackedStep(const PackedLayer& layer, const std::vector<SequenceStep>& steps, const AttentionSpec& spec, const mx::array& q,
             const mx::array& k, const mx::array& v, std::vector<PackedSequence>& sequences, mx::array& out)
      : layer_(layer),
        codecs_(layer.codecs(*spec.rope)),
        steps_(steps),
        spec_(spec),
        q_(q),
        k_(k),
        v_(v),
        kv_heads_(static_cast<std::size_t>(k.shape(1))),
        arrived_(static_cast<std::size_t>(q.shape(2))),
        group_(static_cast<std::size_t>(q.shape(1)) / kv_heads_),
        rows_(arrived_ * group_),
        dim_(static_cast<std::size_t>(q.shape(3))),
        out_(token_major_view(out)),
        sequences_(sequences),
        queries_(new float[q.size()]),
        recent_keys_(steps.size() * kv_heads_),
        recent_values_(recent_keys_.size()),
        prepared_(memory()) {}

  void run() {
    const std::size_t heads = recent_keys_.size();
    if (sequences_.size() != steps_.size()) throw_incomplete();
    for (std::size_t b = 0; b < sequences_.size(); ++b) {
      PackedSequence& sequence = sequences_[b];
      if (sequence.tokens != steps_[b].first || sequence.coded != steps_[b].coded_before) throw_incomplete();
      if (sequence.heads.empty()) sequence.heads = layer_.heads(kv_heads_);
      sequence.tokens += steps_[b].tokens;
      sequence.coded = steps_[b].coded;
      sequence.make_room(sequence.coded);
    }
    prepared_.resize(heads);
    parallel_for(3 * heads, 1, [&](std::size_t i, std::size_t) {
      const std::size_t head = i % heads;
      switch (i / heads) {
        case 0:
          return store(Side::kKeys, head, k_.view(), head_at(head).keys, recent_keys_[head]);
        case 1:
          return store(Side::kValues, head, v_.view(), head_at(head).values, recent_values_[head]);
        case 2:
          return prepare(head);
      }
    });
    std::size_t blocks = 0;
    for (const auto& sequence : sequences_) blocks = std::max(blocks, blocks_of(sequence.coded));
    const std::size_t parts = std::min(blocks, std::max<std::size_t>(1, (kTasks + heads - 1) / heads));
    std::vector<Partial> partials(heads * (parts + 1));
    std::vector<std::atomic<std::size_t>> done(heads);
    parallel_for(partials.size(), 1, [&](std::size_t i, std::size_t) {
      const std::size_t head = i / (parts + 1), part = i % (parts + 1);
      partials[i].begin(rows_, dim_);
      if (part == parts) {
        attend_exact(head, partials[i]);
      } else {
        const std::size_t held = blocks_of(sequence_of(head).coded), end = held * (part + 1) / parts;
        for (const Side side : {Side::kKeys, Side::kValues}) codec(side, head).fetch();
        for (std::size_t block = held * part / parts; block < end; block += at_once())
          attend_blocks(head, block, std::min(block + at_once(), end), end, partials[i]);
      }
      if (++done[head] == parts + 1) merge(head, {partials.data() + head * (parts + 1), parts + 1});
    });
  }

 private:
  // Even out the threads, the same on every machine.
  static constexpr std::size_t kTasks = 16;

  // What is prepared is large, and the same for layer after layer.
  static std::vector<PreparedQueries>& memory() {
    thread_local std::vector<PreparedQueries> prepared;
    return prepared;
  }

  // In 8 bits, and as codes what leaves the window; recent: what was in the window and what has come.
  void store(Side which, std::size_t head, const StridedView& from, PackedSide& side, std::vector<float>& recent) {
    const std::size_t batch = head / kv_heads_, of_sequence = head % kv_heads_;
    const auto& [first, coded_before, skipped, own, coded] = steps_[batch];
    const Quantizer& quantizer = layer_.exact(which);
    const std::size_t begin = std::min(layer_.sinks() + coded_before, first + own), before = std::max(begin, first) - begin;
    recent.resize((before + own) * dim_);
    for (std::size_t t = 0; t < before; ++t) side.exact.read(begin + t, recent.data() + t * dim_);
    const std::span<float> arrived = std::span(recent).subspan(before * dim_);
    for (std::size_t t = 0; t < own; ++t) std::copy_n(from.at(batch, of_sequence, skipped + t), dim_, arrived.data() + t * dim_);
    std::vector<std::uint8_t> encoded(quantizer.encoded_bytes(own));
    quantizer.encode(arrived, encoded);
    if (layer_.window() > 0) quantizer.decode(encoded, arrived);
    side.exact.append(encoded.data(), first, own);
    // Sinks are not recent.
    if (begin > first) recent.erase(recent.begin(), recent.begin() + static_cast<std::ptrdiff_t>((begin - first) * dim_));
    if (const std::size_t leaving = coded - coded_before; leaving > 0)
      side.encode(codecs_.of(which, of_sequence), std::span(recent).first(leaving * dim_), coded_before, sequences_[batch].blocks);
    if (layer_.window() == 0) recent.clear();
  }

  void prepare(std::size_t head) {
    float* to = queries_.get() + head * rows_ * dim_;
    for (std::size_t t = 0; t < arrived_; ++t)
      for (std::size_t of_group = 0; of_group < group_; ++of_group, to += dim_)
        std::copy_n(q_.view().at(head / kv_heads_, head % kv_heads_ * group_ + of_group, t), dim_, to);
    prepared_[head].first_position = layer_.sinks();
    prepared_[head].num_blocks = blocks_of(sequence_of(head).coded);
    codec(Side::kKeys, head).prepare(queries(head, 0, arrived_), prepared_[head]);
  }

  PackedSequence& sequence_of(std::size_t head) const { return sequences_[head / kv_heads_]; }
  PackedHead& head_at(std::size_t head) const { return sequence_of(head).heads[head % kv_heads_]; }
  const SequenceStep& step_of(std::size_t head) const { return steps_[head / kv_heads_]; }

  // Positions that the queries of a token see, as far as attention goes; none for one that is not its sequence's.
  Range seen(std::size_t head, std::size_t token) const {
    const SequenceStep& step = step_of(head);
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
    std::size_t begin = 0, end = arrived_;
    while (begin < end && !reads(begin)) ++begin;
    while (begin < end && !reads(end - 1)) --end;
    if (begin == end) return;
    if (rows_ < kManyQueries) begin = 0, end = arrived_;
    const std::size_t first_row = begin * group_, rows = (end - begin) * group_;
    thread_local std::vector<float> scores;
    scores.resize(rows * std::max(count, at_once() * kPackedBlockTokens));
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

  const BlockCodec& codec(Side side, std::size_t head) const { return codecs_.of(side, head % kv_heads_); }

  // Of tokens begin … end − 1.
  BlockQueries queries(std::size_t head, std::size_t begin, std::size_t end) const {
    return {queries_.get() + (head * rows_ + begin * group_) * dim_, (end - begin) * group_, spec_.scale};
  }

  // Of many queries, a block's scores are as many as those of some blocks of few.
  std::size_t at_once() const { return rows_ < kManyQueries ? kLookUpBlocks : 1; }

  // Blocks begin … end − 1, of those before `last` that will follow.
  void attend_blocks(std::size_t head, std::size_t begin, std::size_t end, std::size_t last, Partial& partial) const {
    const std::size_t first = begin * kPackedBlockTokens, first_position = layer_.sinks() + first,
                      count = std::min(end * kPackedBlockTokens, sequence_of(head).coded) - first;
    const auto blocks_of_side = [&](Side which) {
      const auto& side = which == Side::kKeys ? head_at(head).keys : head_at(head).values;
      const auto& all = sequence_of(head).blocks;
      // While these are computed with, the next ones: their lines lie far apart.
      for (std::size_t block = end; block < std::min(end + (end - begin), last); ++block) fetch(side.of(all[block]));
      std::vector<CodedBlock> blocks;
      for (std::size_t at = 0; at < count; at += kPackedBlockTokens)
        blocks.push_back({side.of(all[begin + blocks.size()]).data(), std::min(kPackedBlockTokens, count - at)});
      if (rows_ < kManyQueries) codec(which, head).look_up(blocks);
      return blocks;
    };
    attend(
        head, count,
        [&](std::size_t token) {
          auto sees = seen(head, token);
          sees.end = std::min(sees.end, exact_begin(head, sees.end));
          return within(sees, first_position, first_position + count);
        },
        [&](const BlockQueries& queries, float* scores) {
          std::size_t at = 0;
          for (const auto& block : blocks_of_side(Side::kKeys)) {
            codec(Side::kKeys, head).score(block, first_position + at, queries, prepared_[head], scores + at, count);
            at += block.tokens;
          }
        },
        [&](const float* weights, std::size_t queries, float* sums) {
          for (const auto& block : blocks_of_side(Side::kValues)) {
            codec(Side::kValues, head).add(block, weights, queries, count, sums);
            weights += block.tokens;
          }
        },
        partial);
  }

  // Sinks, then the window and the tokens that have just come.
  void attend_exact(std::size_t head, Partial& partial) {
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
        head, recent_keys_[head], recent_values_[head], layer_.sinks() + step_of(head).coded_before,
        [&](std::size_t token) {
          auto sees = seen(head, token);
          sees.begin = std::max(sees.begin, exact_begin(head, sees.end));
          return sees;
        },
        partial);
  }

  // In stretches, since a query reads few of many.  sees(token): positions.
  template <class Sees>
  void attend_vectors(std::size_t head, std::vector<float>& k, const std::vector<float>& v, std::size_t first, Sees sees,
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
    for (std::size_t row = 0; row < rows_; ++row) {
      float* out = out_.at(head / kv_heads_, head % kv_heads_ * group_ + row % group_, row / group_);
      for (std::size_t i = 0; i < dim_; ++i)
        out[i] = totals[row] > 0 ? (coded[row * dim_ + i] + exact_weights[row] * parts.back().values[row * dim_ + i]) / totals[row]
                                 : 0.0f;
    }
  }

  const PackedLayer& layer_;
  const PackedLayer::Codecs& codecs_;
  const std::vector<SequenceStep>& steps_;
  const AttentionSpec& spec_;
  const StridedInput q_, k_, v_;
  std::size_t kv_heads_, arrived_, group_, rows_, dim_;
  MutableStridedView out_;
  std::vector<PackedSequence>& sequences_;
  std::unique_ptr<float[]> queries_;                             // [heads, arrived_, group_, dim_]: of a KV head, one matrix
  std::vector<std::vector<float>> recent_keys_, recent_values_;  // of each head, behind the codes: not turned where stored so
  std::vector<PreparedQueries>& prepared_;                       // [heads]
};

}  // namespace

void packed_step(const PackedLayer& layer, const std::vector<SequenceStep>& steps, const AttentionSpec& spec, const mx::array& q,
                 const mx::array& k, const mx::array& v, std::vector<PackedSequence>& sequences, mx::array& out) {
  try {
    PackedStep(layer, steps, spec, q, k, v, sequences, out).run();
  } catch (...) {
    sequences.clear();  // half of a call is in them
    throw;
  }
}

void throw_incomplete() {
  throw std::logic_error("[packed cache] a call before this one failed: its tokens are missing");
}

}  // namespace veloxquant
