#include <algorithm>
#include <cmath>

#include "veloxquant/kernels/sampling.h"

namespace veloxquant::reference {

void sample_tokens(const float* logits, const float* uniforms, std::size_t rows, std::size_t vocabulary, std::int32_t* tokens) {
  for (std::size_t r = 0; r < rows; ++r, logits += vocabulary) {
    const double top = *std::max_element(logits, logits + vocabulary);
    double total = 0, cumulated = 0;
    for (std::size_t i = 0; i < vocabulary; ++i) total += std::exp(logits[i] - top);
    for (std::size_t i = 0; i < vocabulary; ++i) {
      const double weight = std::exp(logits[i] - top);
      if (weight > 0) tokens[r] = static_cast<std::int32_t>(i);
      cumulated += weight;
      if (weight > 0 && cumulated > uniforms[r] * total) break;
    }
  }
}

void sampled_score(const float* logits, const float* uniforms, std::size_t rows, std::size_t vocabulary, float* gradient) {
  for (std::size_t r = 0; r < rows; ++r, logits += vocabulary, gradient += vocabulary) {
    std::int32_t token = 0;
    sample_tokens(logits, uniforms + r, 1, vocabulary, &token);
    const double top = *std::max_element(logits, logits + vocabulary);
    double total = 0;
    for (std::size_t i = 0; i < vocabulary; ++i) total += std::exp(logits[i] - top);
    for (std::size_t i = 0; i < vocabulary; ++i)
      gradient[i] = static_cast<float>((static_cast<std::int32_t>(i) == token ? 1.0 : 0.0) - std::exp(logits[i] - top) / total);
  }
}

}  // namespace veloxquant::reference
