#include "veloxquant/model/language_model.h"

#include <algorithm>
#include <utility>

#include "mlx/transforms.h"

namespace veloxquant {

int LanguageModel::logit_rows() const {
  constexpr int kLogits = 1 << 22;  // 16 MiB
  return std::max(1, kLogits / config_.vocab_size);
}

mx::array LanguageModel::hidden_gradient(const mx::array& hidden, const mx::array& gradient) const {
  const auto head = [this](const std::vector<mx::array>& x) { return std::vector<mx::array>{logits(x[0])}; };
  return mx::vjp(head, {hidden}, {gradient}).second[0];
}

mx::array LanguageModel::forward(const mx::array& tokens, const AttentionCaches& caches) const {
  auto hidden = embed(tokens);
  for (int i = 0; i < config_.num_layers; ++i) hidden = layer(i, hidden, *caches.at(static_cast<std::size_t>(i)));
  return hidden;
}

mx::array LanguageModel::forward_by_layers(const mx::array& tokens, const AttentionCaches& caches,
                                           const std::function<void()>& after_layer) const {
  const bool waits = mx::default_device() == mx::Device::cpu;
  auto hidden = embed(tokens);
  for (int i = 0; i < config_.num_layers; ++i) {
    auto before = std::exchange(hidden, layer(i, hidden, *caches.at(static_cast<std::size_t>(i))));
    mx::async_eval(hidden);
    // A GPU must not run out of work while the host describes the next layer.
    (waits ? hidden : before).eval();
    limit_kept_buffers();
    after_layer();
  }
  return hidden;
}

AttentionCaches LanguageModel::make_caches(const CacheFactory& factory) const {
  AttentionCaches caches;
  for (int i = 0; i < config_.num_layers; ++i) caches.push_back(factory(i));
  return caches;
}

}  // namespace veloxquant
