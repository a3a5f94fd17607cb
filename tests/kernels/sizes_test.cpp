// Every kernel at sizes of nothing, and with arrays that begin one element off any alignment.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "tests/kernels/every_target.h"
#include "veloxquant/kernels/attention.h"
#include "veloxquant/kernels/divergence.h"
#include "veloxquant/kernels/gate.h"
#include "veloxquant/kernels/gaussian_noise.h"
#include "veloxquant/kernels/hadamard.h"
#include "veloxquant/kernels/linear.h"
#include "veloxquant/kernels/nearest_centroid.h"
#include "veloxquant/kernels/rms_norm.h"
#include "veloxquant/kernels/rope.h"
#include "veloxquant/kernels/sampling.h"

namespace veloxquant {
namespace {

constexpr std::size_t kDim = 37;

// An array that begins `off` floats behind an allocation's begin.
class Shifted {
 public:
  Shifted(std::size_t count, std::size_t off, std::uint64_t seed) : off_(off), values_(testing::normal_values(count, seed)) {
    values_.insert(values_.begin(), off, 0.0f);
  }
  float* data() { return values_.data() + off_; }
  std::vector<float> values() const { return {values_.begin() + static_cast<std::ptrdiff_t>(off_), values_.end()}; }

 private:
  std::size_t off_;
  std::vector<float> values_;
};

Strided<float> heads(Shifted& x, std::size_t tokens, std::size_t dim) {
  const auto t = static_cast<std::ptrdiff_t>(tokens), d = static_cast<std::ptrdiff_t>(dim);
  return {x.data(), 2 * t * d, t * d, d};
}
StridedView view(Shifted& x, std::size_t tokens, std::size_t dim) {
  const auto heads_of = heads(x, tokens, dim);
  return {heads_of.data, heads_of.batch_stride, heads_of.head_stride, heads_of.token_stride};
}

// Kernels by name: each computes from arrays for `rows` rows that begin `off` floats in.
const std::vector<std::pair<const char*, std::function<std::vector<float>(std::size_t rows, std::size_t off)>>>& kernels() {
  static const std::vector<std::pair<const char*, std::function<std::vector<float>(std::size_t, std::size_t)>>> table = {
      {"rms_norm",
       [](std::size_t rows, std::size_t off) {
         Shifted x(rows * kDim, off, 1), weight(kDim, off, 2), out(rows * kDim, off, 3);
         rms_norm(x.data(), weight.data(), out.data(), rows, kDim, 1e-5f);
         rms_norm_backward(x.data(), weight.data(), out.data(), out.data(), rows, kDim, 1e-5f);
         return out.values();
       }},
      {"gate",
       [](std::size_t rows, std::size_t off) {
         Shifted joined(rows * 2 * kDim, off, 1), out(rows * kDim, off, 2), gradient(rows * 2 * kDim, off, 3);
         gate_joined(Activation::kGelu, joined.data(), out.data(), rows, kDim);
         gate_joined_backward(Activation::kGelu, joined.data(), out.data(), gradient.data(), rows, kDim);
         return gradient.values();
       }},
      {"linear",
       [](std::size_t rows, std::size_t off) {
         Shifted x(rows * kDim, off, 1), weight(9 * kDim, off, 2), bias(9, off, 3), y(rows * 9, off, 4), back(rows * kDim, off, 5);
         const LinearMap map{weight.data(), bias.data(), 9};
         linear(x.data(), rows, kDim, {&map, 1}, nullptr, y.data());
         linear_backward(y.data(), rows, kDim, {&map, 1}, back.data());
         return back.values();
       }},
      {"rope",
       [](std::size_t rows, std::size_t off) {
         Shifted x(2 * rows * 36, off, 1), out(2 * rows * 36, off, 2);
         const std::vector<float> frequencies(18, 0.3f);
         rope({1, 2, rows, 36}, view(x, rows, 36), frequencies, 1.0f, 3, heads(out, rows, 36));
         return out.values();
       }},
      {"attention",
       [](std::size_t rows, std::size_t off) {
         Shifted q(2 * rows * kDim, off, 1), k(2 * rows * kDim, off, 2), v(2 * rows * kDim, off, 3), out(2 * rows * kDim, off, 4),
             sums(2 * rows, off, 5), by_q(2 * rows * kDim, off, 6), by_k(2 * rows * kDim, off, 7), by_v(2 * rows * kDim, off, 8);
         const AttentionShape shape{1, 2, 2, rows, rows, kDim};
         const AttentionRule rule{.scale = 0.2f};
         const auto in = [&](Shifted& x) { return view(x, rows, kDim); };
         causal_attention(shape, rule, in(q), in(k), in(v), heads(out, rows, kDim), sums.data());
         causal_attention_backward(shape, rule, in(q), in(k), in(v), in(out), sums.data(), in(out), heads(by_q, rows, kDim),
                                   heads(by_k, rows, kDim), heads(by_v, rows, kDim));
         return by_k.values();
       }},
      {"divergence",
       [](std::size_t rows, std::size_t off) {
         Shifted reference(rows * kDim, off, 1), logits(rows * kDim, off, 2);
         const std::vector<std::int32_t> targets(rows, 4);
         std::vector<Divergence> scores(rows);
         divergence(reference.data(), logits.data(), targets.data(), kDim, scores);
         std::vector<float> kl;
         for (const auto& score : scores) kl.push_back(score.kl);
         return kl;
       }},
      {"sampled_score",
       [](std::size_t rows, std::size_t off) {
         Shifted logits(rows * kDim, off, 1);
         const std::vector<float> uniforms(rows, 0.4f);
         sampled_score(logits.data(), uniforms.data(), rows, kDim, logits.data());
         return logits.values();
       }},
      {"gaussian_noise",
       [](std::size_t rows, std::size_t off) {
         Shifted x(rows * kDim, off, 1);
         add_gaussian_noise(x.data(), rows * kDim, 0.5f, 3, x.data());
         return x.values();
       }},
      {"hadamard",
       [](std::size_t rows, std::size_t off) {
         Shifted x(rows * 32, off, 1);
         hadamard(x.data(), rows, 32);
         return x.values();
       }},
      {"nearest_centroid",
       [](std::size_t rows, std::size_t off) {
         Shifted x(rows * kDim, off, 1), distances(rows, off, 2);
         const auto centroids = testing::normal_values(5 * kDim, 3);
         std::vector<std::uint16_t> codes(rows);
         NearestCentroid(centroids, 5, kDim)(x.data(), rows, kDim, codes.data(), 1, distances.data());
         return distances.values();
       }},
  };
  return table;
}

TEST(Sizes, NothingGivesNothing) {
  testing::for_each_target([] {
    for (const auto& [name, kernel] : kernels()) EXPECT_TRUE(kernel(0, 0).empty()) << name;
  });
}

TEST(Sizes, AlignmentDoesNotMatter) {
  testing::for_each_target([] {
    for (const auto& [name, kernel] : kernels()) {
      SCOPED_TRACE(name);
      for (const std::size_t rows : {1, 6, 61}) testing::expect_near(kernel(rows, 1), kernel(rows, 0), 1e-6, 1e-6);
    }
  });
}

}  // namespace
}  // namespace veloxquant
