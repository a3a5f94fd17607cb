#include <algorithm>
#include <cmath>

#include "veloxquant/kernels/divergence.h"

namespace veloxquant::reference {
namespace {

double log_sum_exp(const float* x, std::size_t n) {
  const double top = *std::max_element(x, x + n);
  double sum = 0;
  for (std::size_t i = 0; i < n; ++i) sum += std::exp(x[i] - top);
  return top + std::log(sum);
}

}  // namespace

void divergence(const float* reference, const float* logits, const std::int32_t* targets, std::size_t vocabulary,
                std::span<Divergence> out) {
  for (std::size_t r = 0; r < out.size(); ++r, reference += vocabulary, logits += vocabulary) {
    const double reference_norm = log_sum_exp(reference, vocabulary), norm = log_sum_exp(logits, vocabulary);
    double kl = 0;
    for (std::size_t i = 0; i < vocabulary; ++i) {
      const double log_p = reference[i] - reference_norm;
      if (std::exp(log_p) > 0) kl += std::exp(log_p) * (log_p - (logits[i] - norm));
    }
    out[r].kl = static_cast<float>(std::max(kl, 0.0));
    out[r].cross_entropy = targets[r] < 0 ? 0.0f : static_cast<float>(norm - logits[targets[r]]);
    out[r].top = static_cast<std::int32_t>(std::max_element(logits, logits + vocabulary) - logits);
  }
}

}  // namespace veloxquant::reference
