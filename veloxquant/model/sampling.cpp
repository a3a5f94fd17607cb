#include "veloxquant/model/sampling.h"

#include "mlx/ops.h"
#include "veloxquant/kernels/sampling.h"
#include "veloxquant/model/cpu_operation.h"

namespace veloxquant {
namespace {

// int32 [rows]: the first token whose cumulated probability exceeds the uniform number.
mx::array draw_graph(const mx::array& probabilities, const mx::array& uniforms) {
  const auto cumulated = mx::cumsum(probabilities, -1);
  const auto last = mx::max(cumulated, -1, true);
  // Of what is cumulated, so that rounding never leaves a number beyond it.
  const auto before = mx::less_equal(cumulated, mx::multiply(mx::expand_dims(uniforms, -1), last));
  return mx::sum(mx::astype(before, mx::int32), -1);
}

using Kernel = void (*)(const float* logits, const float* uniforms, std::size_t rows, std::size_t vocabulary, float* out);

mx::array by_kernel(const char* name, const mx::array& logits, const mx::array& uniforms, mx::Shape shape, Kernel kernel) {
  return cpu_operation(
      name, {mx::contiguous(logits), mx::contiguous(uniforms)}, {std::move(shape)}, [kernel](const auto& in, auto& out) {
        kernel(in[0].template data<float>(), in[1].template data<float>(), static_cast<std::size_t>(in[0].shape(0)),
               static_cast<std::size_t>(in[0].shape(1)), out[0].template data<float>());
      })[0];
}

}  // namespace

mx::array sample_tokens(const mx::array& logits, const mx::array& uniforms) {
  if (!own_kernels()) return draw_graph(mx::softmax(logits, -1, /* precise= */ true), uniforms);
  const auto tokens = by_kernel("SampleTokens", logits, uniforms, uniforms.shape(),
                                [](const float* x, const float* u, std::size_t rows, std::size_t vocabulary, float* out) {
                                  std::vector<std::int32_t> drawn(rows);
                                  sample_tokens(x, u, rows, vocabulary, drawn.data());
                                  std::copy(drawn.begin(), drawn.end(), out);  // exact: no vocabulary has 2^24 tokens
                                });
  return mx::astype(tokens, mx::int32);
}

mx::array sampled_score(const mx::array& logits, const mx::array& uniforms) {
  if (own_kernels()) return by_kernel("SampledScore", logits, uniforms, logits.shape(), sampled_score);
  const auto probabilities = mx::softmax(logits, -1, /* precise= */ true);
  const auto token = mx::expand_dims(draw_graph(probabilities, uniforms), -1);
  const auto drawn = mx::equal(mx::reshape(mx::arange(logits.shape(-1), mx::int32), {1, -1}), token);
  return mx::subtract(mx::astype(drawn, mx::float32), probabilities);
}

}  // namespace veloxquant
