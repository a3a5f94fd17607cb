#include "veloxquant/calibrate/recall.h"

#include <algorithm>

#include "mlx/ops.h"
#include "mlx/transforms.h"

namespace veloxquant {

RecallCount recall(const LanguageModel& model, std::span<const std::int32_t> tokens, const AnswerSpans& answers,
                   const CacheFactory& factory) {
  const int length = static_cast<int>(tokens.size()) - 1;  // nothing is asked about what follows the last token
  const auto hidden = model.forward_by_layers(mx::array(tokens.data(), {1, length}, mx::int32), model.make_caches(factory), [] {});
  std::vector<mx::array> tops;
  for (const auto& [begin, end] : answers)
    tops.push_back(mx::argmax(model.logits(mx::slice(hidden, {0, begin - 1, 0}, {1, end - 1, hidden.shape(2)})), -1));
  mx::eval(tops);
  RecallCount count{answers.size(), 0};
  for (std::size_t i = 0; i < tops.size(); ++i) {
    const auto [begin, end] = answers[i];
    const auto* top = tops[i].data<std::uint32_t>();
    count.right += std::equal(top, top + (end - begin), tokens.begin() + begin, [](std::uint32_t predicted, std::int32_t token) {
      return static_cast<std::int32_t>(predicted) == token;
    });
  }
  return count;
}

}  // namespace veloxquant
