#include "veloxquant/model/divergence.h"

#include <algorithm>

#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "veloxquant/kernels/divergence.h"
#include "veloxquant/model/cpu_operation.h"

namespace veloxquant {
namespace {

// [T, 3]: KL, cross-entropy, argmax as a float (exact below 2^24, beyond any vocabulary).
mx::array score_graph(const mx::array& reference, const mx::array& logits, const mx::array& targets) {
  const auto log_reference = mx::subtract(reference, mx::logsumexp(reference, -1, true));
  const auto log_probability = mx::subtract(logits, mx::logsumexp(logits, -1, true));
  const auto kl = mx::sum(mx::multiply(mx::exp(log_reference), mx::subtract(log_reference, log_probability)), -1, true);
  const auto index = mx::expand_dims(mx::maximum(targets, mx::array(0)), -1);
  const auto picked = mx::negative(mx::take_along_axis(log_probability, index, -1));
  const auto cross_entropy = mx::where(mx::expand_dims(mx::less(targets, mx::array(0)), -1), mx::array(0.0f), picked);
  return mx::concatenate({mx::maximum(kl, mx::array(0.0f)), cross_entropy, mx::astype(mx::argmax(logits, -1, true), mx::float32)},
                         -1);
}

mx::array score_logits(const mx::array& reference, const mx::array& logits, const mx::array& targets) {
  if (!own_kernels()) return score_graph(reference, logits, targets);
  return cpu_operation("Divergence", {mx::contiguous(reference), mx::contiguous(logits), targets}, {{logits.shape(0), 3}},
                       [](const std::vector<mx::array>& in, std::vector<mx::array>& out) {
                         std::vector<Divergence> scores(static_cast<std::size_t>(out[0].shape(0)));
                         divergence(in[0].data<float>(), in[1].data<float>(), in[2].data<std::int32_t>(),
                                    static_cast<std::size_t>(in[1].shape(1)), scores);
                         float* row = out[0].data<float>();
                         for (const auto& score : scores) {
                           *row++ = score.kl;
                           *row++ = score.cross_entropy;
                           *row++ = static_cast<float>(score.top);
                         }
                       })[0];
}

}  // namespace

std::vector<std::vector<PositionScore>> score_hidden(const LanguageModel& model, const std::vector<mx::array>& hidden,
                                                     std::span<const std::int32_t> targets) {
  const int tokens = hidden.at(0).shape(1), width = hidden[0].shape(2);
  const int chunk = std::min(model.logit_rows(), tokens);
  std::vector<std::vector<PositionScore>> scores(hidden.size());
  for (int begin = 0; begin < tokens; begin += chunk) {
    const int end = std::min(begin + chunk, tokens);
    std::vector<std::int32_t> next(static_cast<std::size_t>(end - begin), -1);
    if (!targets.empty()) std::copy(targets.begin() + begin, targets.begin() + end, next.begin());
    const mx::array target_array(next.data(), {end - begin});
    const auto logits_of = [&](const mx::array& x) {
      return model.logits(mx::reshape(mx::slice(x, {0, begin, 0}, {1, end, width}), {end - begin, width}));
    };
    const auto reference = logits_of(hidden[0]);
    mx::eval(reference);
    for (std::size_t s = 0; s < hidden.size(); ++s) {
      const auto rows = score_logits(reference, s == 0 ? reference : logits_of(hidden[s]), target_array);
      mx::eval(rows);
      const float* row = rows.data<float>();
      for (int t = 0; t < end - begin; ++t, row += 3) scores[s].push_back({row[0], row[1], static_cast<int>(row[2])});
    }
  }
  return scores;
}

}  // namespace veloxquant
