// The operations in MLX's graph; the kernels behind them have tests of their own.
#include "veloxquant/model/sampling.h"

#include <gtest/gtest.h>

#include "mlx/ops.h"
#include "mlx/random.h"
#include "mlx/transforms.h"
#include "veloxquant/model/cpu_operation.h"

namespace veloxquant {
namespace {

// MLX cumulates in float32, which moves the border between two tokens by 10⁻⁷ or so of all probability: a few in a hundred rows of
// so many tokens may fall to the other side.
TEST(SamplingOperation, EqualsMlxOperations) {
  constexpr int kRows = 192, kVocabulary = 8192;
  const auto logits = mx::multiply(mx::random::normal({kRows, kVocabulary}, mx::float32, mx::random::key(1)), mx::array(3.0f));
  const auto uniforms = mx::random::uniform({kRows}, mx::float32, mx::random::key(2));
  const auto tokens = sample_tokens(logits, uniforms), score = sampled_score(logits, uniforms);
  mx::eval(tokens, score);
  const MlxOperationsScope scope;
  const auto same = mx::equal(tokens, sample_tokens(logits, uniforms));
  EXPECT_GE(mx::sum(mx::astype(same, mx::int32)).item<int>(), kRows * 95 / 100);
  const auto difference = mx::max(mx::abs(mx::subtract(score, sampled_score(logits, uniforms))), -1);
  EXPECT_LE(mx::max(mx::where(same, difference, mx::array(0.0f))).item<float>(), 2e-5f);
}

}  // namespace
}  // namespace veloxquant
