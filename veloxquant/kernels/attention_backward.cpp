#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "veloxquant/core/parallel.h"
#include "veloxquant/kernels/attention.h"
#include "veloxquant/kernels/attention_blocks.h"
#include "veloxquant/kernels/gemm.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "veloxquant/kernels/attention_backward.cpp"
// clang-format off
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "hwy/contrib/math/math-inl.h"
#include "veloxquant/kernels/rows-inl.h"
// clang-format on

HWY_BEFORE_NAMESPACE();
namespace veloxquant {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

float dot_product(const float* a, const float* b, std::size_t dim) {
  return row_dot(a, b, dim);
}

// Of one query: scores [count] become weights p, gains [count] (g·v) become ∂/∂(q·k) = p·(g·v − g·o)·scale, with a soft cap times
// 1 − tanh².
template <bool kCapped>
void weights_and_gains(float* scores, float* gains, std::size_t count, float log_sum, float expected, const AttentionRule& rule) {
  const hn::ScalableTag<float> d;
  const std::size_t lanes = hn::Lanes(d), whole = count / lanes * lanes;
  const auto vlog_sum = hn::Set(d, log_sum), vexpected = hn::Set(d, expected), scale = hn::Set(d, rule.scale);
  const auto cap = hn::Set(d, rule.soft_cap), inverse = hn::Set(d, kCapped ? 1.0f / rule.soft_cap : 0.0f);
  const auto step = [&](auto score, auto gain, auto& weight, auto& slope) HWY_ATTR {
    slope = scale;
    if (kCapped) {
      const auto tanh = hn::Tanh(d, hn::Mul(score, inverse));
      score = hn::Mul(cap, tanh);
      slope = hn::NegMulAdd(hn::Mul(scale, tanh), tanh, scale);
    }
    weight = hn::Exp(d, hn::Sub(score, vlog_sum));
    slope = hn::Mul(hn::Mul(weight, hn::Sub(gain, vexpected)), slope);
  };
  auto weight = scale, gain = scale;
  for (std::size_t i = 0; i < whole; i += lanes) {
    step(hn::LoadU(d, scores + i), hn::LoadU(d, gains + i), weight, gain);
    hn::StoreU(weight, d, scores + i);
    hn::StoreU(gain, d, gains + i);
  }
  if (whole == count) return;
  HWY_ALIGN float last_scores[hn::MaxLanes(d)] = {}, last_gains[hn::MaxLanes(d)] = {};
  std::copy(scores + whole, scores + count, last_scores);
  std::copy(gains + whole, gains + count, last_gains);
  step(hn::Load(d, last_scores), hn::Load(d, last_gains), weight, gain);
  hn::Store(weight, d, last_scores);
  hn::Store(gain, d, last_gains);
  std::copy_n(last_scores, count - whole, scores + whole);
  std::copy_n(last_gains, count - whole, gains + whole);
}

void weights_and_gains_of_rule(float* scores, float* gains, std::size_t count, float log_sum, float expected,
                               const AttentionRule& rule) {
  if (rule.soft_cap > 0) return weights_and_gains<true>(scores, gains, count, log_sum, expected, rule);
  weights_and_gains<false>(scores, gains, count, log_sum, expected, rule);
}

}  // namespace HWY_NAMESPACE
}  // namespace veloxquant
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace veloxquant {

HWY_EXPORT(dot_product);
HWY_EXPORT(weights_and_gains_of_rule);

namespace {

// Tasks for threads to share: heads of all sequences where there are so many, else stretches of their keys as well.  Each stretch
// but the first needs an array of its own for the gradient of the queries, hence not more.
constexpr std::size_t kTasks = 8;

int stride(const auto& view) {
  return static_cast<int>(view.token_stride);
}

struct GradientPart {
  KeyPart keys;
  MutableStridedView grad_k, grad_v;
};

class Backward {
 public:
  Backward(const AttentionShape& shape, const AttentionRule& rule, StridedView q, StridedView out, const float* log_sums,
           StridedView grad_out, MutableStridedView grad_q, const std::array<GradientPart, 2>& parts)
      : shape_(shape),
        rule_(rule),
        q_(q),
        out_(out),
        log_sums_(log_sums),
        grad_out_(grad_out),
        grad_q_(grad_q),
        parts_(parts),
        group_(shape.query_heads / shape.kv_heads),
        whole_blocks_(parts[1].keys.oldest == 0) {
    const std::size_t blocks = std::max<std::size_t>(1, (shape.key_tokens + kKeyBlock - 1) / kKeyBlock);
    const std::size_t heads = std::max<std::size_t>(1, shape.batch * shape.kv_heads),
                      most = std::max<std::size_t>(1, kTasks / heads);
    stretch_ = (blocks + most - 1) / most * kKeyBlock;
    stretches_ = std::max<std::size_t>(1, (shape.key_tokens + stretch_ - 1) / stretch_);
    rows_ = shape.batch * shape.query_heads * shape.query_tokens;
    expected_.resize(rows_);
    partial_.resize((stretches_ - 1) * rows_ * shape.head_dim);
  }

  void run() {
    for_each_block_of_queries([this](std::size_t b, std::size_t h, std::size_t begin, std::size_t end) {
      for (std::size_t t = begin; t < end; ++t) {
        expected_[row(b, h, t)] = HWY_DYNAMIC_DISPATCH(dot_product)(grad_out_.at(b, h, t), out_.at(b, h, t), shape_.head_dim);
        std::fill_n(grad_q_.at(b, h, t), shape_.head_dim, 0.0f);
      }
    });
    const std::size_t heads = shape_.batch * shape_.kv_heads;
    // The first stretches, which most queries see, come first, so that threads finish together.
    parallel_for(heads * stretches_, 1, [&](std::size_t i, std::size_t) {
      const std::size_t head = i % heads;
      run_stretch(head / shape_.kv_heads, head % shape_.kv_heads, i / heads);
    });
    for_each_block_of_queries([this](std::size_t b, std::size_t h, std::size_t begin, std::size_t end) {
      for (std::size_t stretch = 1; stretch < stretches_; ++stretch)
        for (std::size_t t = begin; t < end; ++t) {
          float* sum = grad_q_.at(b, h, t);
          const float* more = partial(stretch, b, h, t);
          if (visible_keys(shape_, rule_, b, t).end > stretch * stretch_)
            std::transform(sum, sum + shape_.head_dim, more, sum, [](float x, float y) { return x + y; });
        }
    });
  }

 private:
  std::size_t row(std::size_t b, std::size_t h, std::size_t t) const {
    return (b * shape_.query_heads + h) * shape_.query_tokens + t;
  }

  float* partial(std::size_t stretch, std::size_t b, std::size_t h, std::size_t t) {
    return partial_.data() + ((stretch - 1) * rows_ + row(b, h, t)) * shape_.head_dim;
  }

  template <class Body>
  void for_each_block_of_queries(Body body) {
    const std::size_t blocks = (shape_.query_tokens + kQueryBlock - 1) / kQueryBlock;
    parallel_for(shape_.batch * shape_.query_heads * blocks, 1, [&](std::size_t i, std::size_t) {
      const std::size_t head = i / blocks, begin = i % blocks * kQueryBlock;
      body(head / shape_.query_heads, head % shape_.query_heads, begin, std::min(begin + kQueryBlock, shape_.query_tokens));
    });
  }

  void run_stretch(std::size_t b, std::size_t kv, std::size_t stretch) {
    const std::size_t first = stretch * stretch_, last = std::min(first + stretch_, shape_.key_tokens);
    for (const GradientPart& part : parts_)
      for (std::size_t begin = std::max(first, part.keys.first); begin < last; begin += kKeyBlock)
        run_keys(part, b, kv, stretch, {begin, std::min(begin + kKeyBlock, last)});
  }

  void run_keys(const GradientPart& part, std::size_t b, std::size_t kv, std::size_t stretch, KeyRange keys) {
    for (std::size_t s = keys.begin; s < keys.end; ++s)
      for (const MutableStridedView& gradient : {part.grad_k, part.grad_v})
        std::fill_n(gradient.at(b, kv, s - part.keys.first), shape_.head_dim, 0.0f);
    const std::size_t before = shape_.key_tokens - shape_.query_tokens, from = keys.begin > before ? keys.begin - before : 0;
    for (std::size_t h = kv * group_; h < (kv + 1) * group_; ++h)
      for (std::size_t t = from / kQueryBlock * kQueryBlock; t < shape_.query_tokens; t += kQueryBlock) {
        const std::size_t rows = std::min(kQueryBlock, shape_.query_tokens - t);
        const KeyRange seen = part.keys.seen(shape_, rule_, b, t, rows);
        const KeyRange both = {std::max(keys.begin, seen.begin), std::min(keys.end, seen.end)};
        if (both.begin < both.end) run_block(part, b, kv, h, stretch, whole_blocks_ ? keys : both, t, rows);
      }
  }

  void run_block(const GradientPart& part, std::size_t b, std::size_t kv, std::size_t h, std::size_t stretch, KeyRange keys,
                 std::size_t first, std::size_t rows) {
    const KeyPart& from = part.keys;
    const auto n = static_cast<int>(rows), columns = static_cast<int>(keys.end - keys.begin),
               dim = static_cast<int>(shape_.head_dim);
    thread_local std::vector<float> weights(kQueryBlock * kKeyBlock), gains(kQueryBlock * kKeyBlock);
    const float *q = q_.at(b, h, first), *k = from.k.at(b, kv, keys.begin - from.first),
                *v = from.v.at(b, kv, keys.begin - from.first), *g = grad_out_.at(b, h, first);
    gemm(false, true, n, columns, dim, rule_.scale, q, stride(q_), k, stride(from.k), 0.0f, weights.data(), columns);
    gemm(false, true, n, columns, dim, 1.0f, g, stride(grad_out_), v, stride(from.v), 0.0f, gains.data(), columns);
    for (std::size_t r = 0; r < rows; ++r)
      weigh(from, b, h, first + r, keys, weights.data() + r * columns, gains.data() + r * columns);
    gemm(true, false, columns, dim, n, 1.0f, weights.data(), columns, g, stride(grad_out_), 1.0f,
         part.grad_v.at(b, kv, keys.begin - from.first), stride(part.grad_v));
    gemm(true, false, columns, dim, n, 1.0f, gains.data(), columns, q, stride(q_), 1.0f,
         part.grad_k.at(b, kv, keys.begin - from.first), stride(part.grad_k));
    float* grad_q = stretch == 0 ? grad_q_.at(b, h, first) : partial(stretch, b, h, first);
    gemm(false, false, n, dim, columns, 1.0f, gains.data(), columns, k, stride(from.k), 1.0f, grad_q,
         stretch == 0 ? stride(grad_q_) : dim);
  }

  // A row of scores and of g·v: what the query sees becomes weights and gains, the rest zero.
  void weigh(const KeyPart& part, std::size_t b, std::size_t h, std::size_t t, KeyRange keys, float* weights, float* gains) {
    const std::size_t count = keys.end - keys.begin;
    const auto [first, last] = seen_of_block(part.seen(shape_, rule_, b, t), keys.begin, count);
    HWY_DYNAMIC_DISPATCH(weights_and_gains_of_rule)
    (weights + first, gains + first, last - first, log_sums_[row(b, h, t)], expected_[row(b, h, t)], rule_);
    for (float* x : {weights, gains}) {
      std::fill(x, x + first, 0.0f);
      std::fill(x + last, x + count, 0.0f);
    }
  }

  const AttentionShape& shape_;
  const AttentionRule& rule_;
  StridedView q_, out_;
  const float* log_sums_;
  StridedView grad_out_;
  MutableStridedView grad_q_;
  std::array<GradientPart, 2> parts_;
  std::size_t group_, stretch_, stretches_, rows_;
  bool whole_blocks_;            // or only what is seen of a block of keys, which of near ones is little
  std::vector<float> expected_;  // g·o of each query
  std::vector<float> partial_;   // [stretches − 1, batch, query_heads, query_tokens, head_dim]: gradients of queries
};

}  // namespace

void causal_attention_backward(const AttentionShape& shape, const AttentionRule& rule, StridedView q, StridedView k, StridedView v,
                               StridedView out, const float* log_sums, StridedView grad_out, MutableStridedView grad_q,
                               MutableStridedView grad_k, MutableStridedView grad_v, const NearKeys& near,
                               MutableStridedView grad_near_k, MutableStridedView grad_near_v) {
  const auto [far_keys, near_keys] = key_parts(shape, k, v, near);
  Backward(shape, rule, q, out, log_sums, grad_out, grad_q, {{{far_keys, grad_k, grad_v}, {near_keys, grad_near_k, grad_near_v}}})
      .run();
}

}  // namespace veloxquant
#endif
