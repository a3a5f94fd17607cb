#include "veloxquant/kernels/attention.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "veloxquant/core/parallel.h"
#include "veloxquant/kernels/attention_blocks.h"
#include "veloxquant/kernels/gemm.h"
#include "veloxquant/kernels/running_softmax.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "veloxquant/kernels/attention.cpp"
// clang-format off
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "veloxquant/kernels/rows-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace veloxquant {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

void scale_vector(float* x, std::size_t dim, float factor) {
  scale_row(x, dim, factor);
}

// scores [rows, count] of queries q[r] and keys that lie token_stride apart: scale · q[r]·k[s].  As many keys at a time as a vector
// has lanes meet all queries, so that they come from memory once, and a tree of additions sums up all products.
void score_keys(const float* const* q, std::size_t rows, const float* k, std::ptrdiff_t token_stride, std::size_t count,
                std::size_t dim, float scale, float* scores) {
  const hn::ScalableTag<float> d;
  constexpr std::size_t kKeys = hn::MaxLanes(hn::ScalableTag<float>());
  const std::size_t lanes = hn::Lanes(d), whole = dim / lanes * lanes;
  std::size_t s = 0;
  for (; s + kKeys <= count; s += kKeys, k += static_cast<std::ptrdiff_t>(kKeys) * token_stride) {
    for (std::size_t r = 0; r < rows; ++r) {
      hn::Vec<hn::ScalableTag<float>> sums[kKeys];
      for (auto& sum : sums) sum = hn::Zero(d);
      for (std::size_t i = 0; i < whole; i += lanes) {
        const auto query = hn::LoadU(d, q[r] + i);
        for (std::size_t j = 0; j < kKeys; ++j)
          sums[j] = hn::MulAdd(query, hn::LoadU(d, k + static_cast<std::ptrdiff_t>(j) * token_stride + i), sums[j]);
      }
      sum_vectors<kKeys>(sums);
      float* out = scores + r * count + s;
      hn::StoreU(hn::Mul(sums[0], hn::Set(d, scale)), d, out);
      for (std::size_t j = 0; whole < dim && j < kKeys; ++j) {
        const float* key = k + static_cast<std::ptrdiff_t>(j) * token_stride;
        for (std::size_t i = whole; i < dim; ++i) out[j] += scale * q[r][i] * key[i];
      }
    }
  }
  for (; s < count; ++s, k += token_stride)
    for (std::size_t r = 0; r < rows; ++r) scores[r * count + s] = scale * row_dot(q[r], k, dim);
}

// out [rows, dim] += weights [rows, count] · v, whose tokens lie token_stride apart.  Some values at a time meet all rows, so that
// they come from memory once, and a sum is read and written once for all of them.
void add_values(const float* weights, std::size_t rows, const float* v, std::ptrdiff_t token_stride, std::size_t count,
                std::size_t dim, float* out) {
  const hn::ScalableTag<float> d;
  using V = hn::Vec<hn::ScalableTag<float>>;
  constexpr std::size_t kValues = 8;
  const std::size_t lanes = hn::Lanes(d), whole = dim / lanes * lanes;
  const auto add = [&](std::size_t s, std::size_t r, auto values) HWY_ATTR {
    constexpr std::size_t n = decltype(values)::value;
    const float *w = weights + r * count + s, *from[n];
    float* to = out + r * dim;
    V ws[n];
    for (std::size_t j = 0; j < n; ++j) {
      ws[j] = hn::Set(d, w[j]);
      from[j] = v + static_cast<std::ptrdiff_t>(s + j) * token_stride;
    }
    for (std::size_t i = 0; i < whole; i += lanes) {
      V sum = hn::LoadU(d, to + i);
      for (std::size_t j = 0; j < n; ++j) sum = hn::MulAdd(ws[j], hn::LoadU(d, from[j] + i), sum);
      hn::StoreU(sum, d, to + i);
    }
    for (std::size_t i = whole; i < dim; ++i)
      for (std::size_t j = 0; j < n; ++j) to[i] += w[j] * from[j][i];
  };
  std::size_t s = 0;
  for (; s + kValues <= count; s += kValues)
    for (std::size_t r = 0; r < rows; ++r) add(s, r, std::integral_constant<std::size_t, kValues>());
  for (; s < count; ++s)
    for (std::size_t r = 0; r < rows; ++r) add(s, r, std::integral_constant<std::size_t, 1>());
}

}  // namespace HWY_NAMESPACE
}  // namespace veloxquant
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace veloxquant {

HWY_EXPORT(scale_vector);
HWY_EXPORT(score_keys);
HWY_EXPORT(add_values);

namespace {

// Up to here a matrix product is too thin to pay for packing its operands.
constexpr std::size_t kFewQueries = 4;

struct RunningSoftmax {
  std::vector<float> maximum, sum;

  explicit RunningSoftmax(std::size_t rows) : maximum(rows, std::numeric_limits<float>::lowest()), sum(rows, 0.0f) {}

  // A row that saw no key has weights of zero.
  float inverse_sum(std::size_t row) const { return sum[row] > 0 ? 1.0f / sum[row] : 0.0f; }
};

// One block of scores of one query: those that it sees become weights, the others zero.  Returns by how much what was summed so
// far shrinks.
float weigh_scores(const AttentionRule& rule, float* scores, std::size_t count, KeyRange seen, std::size_t begin, float& maximum,
                   float& sum) {
  const auto [first, last] = seen_of_block(seen, begin, count);
  float shrink = 1.0f;
  if (last > first) shrink = running_softmax(scores + first, last - first, rule.soft_cap, maximum, sum);
  std::fill(scores, scores + first, 0.0f);
  std::fill(scores + last, scores + count, 0.0f);
  return shrink;
}

float log_sum(float maximum, float sum) {
  return sum > 0 ? maximum + std::log(sum) : 0.0f;
}

// A block of queries of one head against all keys that they see.
void attend_block(const AttentionShape& shape, const AttentionRule& rule, std::size_t b, std::size_t h, std::size_t first,
                  std::size_t rows, StridedView q, const std::array<KeyPart, 2>& parts, MutableStridedView out, float* log_sums) {
  const std::size_t kv = h / (shape.query_heads / shape.kv_heads);
  const auto n = static_cast<int>(rows), dim = static_cast<int>(shape.head_dim);
  thread_local std::vector<float> scores(kQueryBlock * kKeyBlock);
  RunningSoftmax softmax(rows);
  bool empty = true;
  for (const KeyPart& part : parts) {
    const KeyRange seen = part.seen(shape, rule, b, first, rows);
    for (std::size_t begin = seen.begin; begin < seen.end; begin += kKeyBlock) {
      const std::size_t keys = std::min(kKeyBlock, seen.end - begin);
      const auto columns = static_cast<int>(keys);
      gemm(false, true, n, columns, dim, rule.scale, q.at(b, h, first), static_cast<int>(q.token_stride),
           part.k.at(b, kv, begin - part.first), static_cast<int>(part.k.token_stride), 0.0f, scores.data(), columns);
      for (std::size_t r = 0; r < rows; ++r) {
        const float shrink = weigh_scores(rule, scores.data() + r * keys, keys, part.seen(shape, rule, b, first + r), begin,
                                          softmax.maximum[r], softmax.sum[r]);
        if (!empty && shrink != 1.0f) HWY_DYNAMIC_DISPATCH(scale_vector)(out.at(b, h, first + r), shape.head_dim, shrink);
      }
      gemm(false, false, n, dim, columns, 1.0f, scores.data(), columns, part.v.at(b, kv, begin - part.first),
           static_cast<int>(part.v.token_stride), empty ? 0.0f : 1.0f, out.at(b, h, first), static_cast<int>(out.token_stride));
      empty = false;
    }
  }
  for (std::size_t r = 0; r < rows; ++r) {
    float* result = out.at(b, h, first + r);
    if (empty) std::fill_n(result, shape.head_dim, 0.0f);
    HWY_DYNAMIC_DISPATCH(scale_vector)(result, shape.head_dim, softmax.inverse_sum(r));
    if (log_sums)
      log_sums[(b * shape.query_heads + h) * shape.query_tokens + first + r] = log_sum(softmax.maximum[r], softmax.sum[r]);
  }
}

// The few queries of decoding.  Work is shared out along the keys too, or a long context of one KV head would keep one thread busy.
// A part is a stretch of keys for all queries of a group of heads (its rows), so that a block of keys and values comes from memory
// once.
class FewQueries {
 public:
  FewQueries(const AttentionShape& shape, const AttentionRule& rule, StridedView q, StridedView k, StridedView v,
             MutableStridedView out, float* log_sums)
      : shape_(shape),
        rule_(rule),
        q_(q),
        k_(k),
        v_(v),
        out_(out),
        log_sums_(log_sums),
        group_(shape.query_heads / shape.kv_heads),
        rows_(group_ * shape.query_tokens),
        parts_((shape.key_tokens + kKeysOfPart - 1) / kKeysOfPart),
        softmax_(shape.batch * shape.kv_heads * parts_ * rows_),
        values_(softmax_.sum.size() * shape.head_dim) {}

  void run() {
    const std::size_t heads = shape_.batch * shape_.kv_heads;
    parallel_for(heads * parts_, 1, [this](std::size_t begin, std::size_t end) {
      for (std::size_t i = begin; i < end; ++i) attend_part(i / parts_ / shape_.kv_heads, i / parts_ % shape_.kv_heads, i % parts_);
    });
    for (std::size_t head = 0; head < heads; ++head)
      for (std::size_t row = 0; row < rows_; ++row) merge_parts(head / shape_.kv_heads, head % shape_.kv_heads, row);
  }

 private:
  // Few enough that threads finish together where there are few heads.
  static constexpr std::size_t kKeysOfPart = 2 * kKeyBlock;

  std::size_t head(std::size_t kv, std::size_t row) const { return kv * group_ + row / shape_.query_tokens; }
  std::size_t token(std::size_t row) const { return row % shape_.query_tokens; }
  std::size_t index(std::size_t b, std::size_t kv, std::size_t part, std::size_t row) const {
    return ((b * shape_.kv_heads + kv) * parts_ + part) * rows_ + row;
  }

  void attend_part(std::size_t b, std::size_t kv, std::size_t part) {
    const std::size_t first = part * kKeysOfPart, last = std::min(first + kKeysOfPart, shape_.key_tokens);
    std::vector<const float*> queries(rows_);
    for (std::size_t row = 0; row < rows_; ++row) queries[row] = q_.at(b, head(kv, row), token(row));
    // Keys that any of the queries sees: from what the first token sees to what the last one does.
    const KeyRange seen{visible_keys(shape_, rule_, b, 0).begin, visible_keys(shape_, rule_, b, shape_.query_tokens - 1).end};
    for (std::size_t begin = first; begin < last; begin += kKeyBlock) {
      const std::size_t from = std::max(begin, seen.begin), to = std::min({begin + kKeyBlock, last, seen.end});
      if (from < to) attend_block_of(b, kv, queries, from, to - from, index(b, kv, part, 0));
    }
  }

  // For all rows, of which i is the first.
  void attend_block_of(std::size_t b, std::size_t kv, const std::vector<const float*>& queries, std::size_t begin,
                       std::size_t count, std::size_t i) {
    thread_local std::vector<float> scores;
    scores.resize(std::max(scores.size(), rows_ * count));
    float* values = values_.data() + i * shape_.head_dim;
    HWY_DYNAMIC_DISPATCH(score_keys)
    (queries.data(), rows_, k_.at(b, kv, begin), k_.token_stride, count, shape_.head_dim, rule_.scale, scores.data());
    for (std::size_t row = 0; row < rows_; ++row) {
      const float shrink = weigh_scores(rule_, scores.data() + row * count, count, visible_keys(shape_, rule_, b, token(row)),
                                        begin, softmax_.maximum[i + row], softmax_.sum[i + row]);
      if (shrink != 1.0f) HWY_DYNAMIC_DISPATCH(scale_vector)(values + row * shape_.head_dim, shape_.head_dim, shrink);
    }
    HWY_DYNAMIC_DISPATCH(add_values)
    (scores.data(), rows_, v_.at(b, kv, begin), v_.token_stride, count, shape_.head_dim, values);
  }

  // Each part is relative to a maximum of its own; one that a query does not see has the lowest there is, and weighs nothing.
  void merge_parts(std::size_t b, std::size_t kv, std::size_t row) {
    float top = std::numeric_limits<float>::lowest(), sum = 0;
    for (std::size_t part = 0; part < parts_; ++part) top = std::max(top, softmax_.maximum[index(b, kv, part, row)]);
    std::vector<float> weights(parts_);
    for (std::size_t part = 0; part < parts_; ++part) {
      weights[part] = std::exp(softmax_.maximum[index(b, kv, part, row)] - top);
      sum += weights[part] * softmax_.sum[index(b, kv, part, row)];
    }
    for (float& weight : weights) weight = sum > 0 ? weight / sum : 0.0f;
    if (log_sums_) log_sums_[(b * shape_.query_heads + head(kv, row)) * shape_.query_tokens + token(row)] = log_sum(top, sum);
    float* result = out_.at(b, head(kv, row), token(row));
    std::fill_n(result, shape_.head_dim, 0.0f);
    HWY_DYNAMIC_DISPATCH(add_values)
    (weights.data(), 1, values_.data() + index(b, kv, 0, row) * shape_.head_dim,
     static_cast<std::ptrdiff_t>(rows_ * shape_.head_dim), parts_, shape_.head_dim, result);
  }

  const AttentionShape& shape_;
  const AttentionRule& rule_;
  StridedView q_, k_, v_;
  MutableStridedView out_;
  float* log_sums_;
  std::size_t group_, rows_, parts_;
  RunningSoftmax softmax_;     // [batch, kv_heads, parts, rows]
  std::vector<float> values_;  // [batch, kv_heads, parts, rows, head_dim], not yet divided by the sums
};

}  // namespace

void causal_attention(const AttentionShape& shape, const AttentionRule& rule, StridedView q, StridedView k, StridedView v,
                      MutableStridedView out, float* log_sums, const NearKeys& near) {
  if (shape.query_tokens <= kFewQueries && near.window == 0) return FewQueries(shape, rule, q, k, v, out, log_sums).run();
  const auto parts = key_parts(shape, k, v, near);
  const std::size_t blocks = (shape.query_tokens + kQueryBlock - 1) / kQueryBlock, heads = shape.batch * shape.query_heads;
  parallel_for(heads * blocks, 1, [&](std::size_t begin, std::size_t end) {
    for (std::size_t i = begin; i < end; ++i) {
      // The longest blocks, at the end of the sequence, come first, so that threads finish together.
      const std::size_t block = blocks - 1 - i / heads, head = i % heads, first = block * kQueryBlock;
      attend_block(shape, rule, head / shape.query_heads, head % shape.query_heads, first,
                   std::min(kQueryBlock, shape.query_tokens - first), q, parts, out, log_sums);
    }
  });
}

}  // namespace veloxquant
#endif
