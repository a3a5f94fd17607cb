#include <algorithm>
#include <cmath>

#include "veloxquant/kernels/running_softmax.h"

namespace veloxquant::reference {

float running_softmax(float* scores, std::size_t count, float soft_cap, float& maximum, float& sum) {
  float top = maximum;
  for (std::size_t i = 0; i < count; ++i) {
    if (soft_cap > 0) scores[i] = soft_cap * std::tanh(scores[i] / soft_cap);
    top = std::max(top, scores[i]);
  }
  const float shrink = std::exp(maximum - top);
  sum *= shrink;
  for (std::size_t i = 0; i < count; ++i) sum += scores[i] = std::exp(scores[i] - top);
  maximum = top;
  return shrink;
}

}  // namespace veloxquant::reference
