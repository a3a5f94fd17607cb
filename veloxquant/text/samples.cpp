#include "veloxquant/text/samples.h"

#include <algorithm>

#include "veloxquant/core/error.h"

namespace veloxquant {
namespace {

void check_counts(int count, int least, int length) {
  if (count < least) throw_invalid("samples", "expected at least {}, got {}", least, count);
  if (length < 1) throw_invalid("samples", "length: expected at least 1 token, got {}", length);
}

}  // namespace

TokenBatch cut_samples(const std::vector<std::vector<std::int32_t>>& texts, int num_samples, int length) {
  check_counts(num_samples, 1, length);
  const auto width = static_cast<std::size_t>(length);
  std::vector<const std::int32_t*> windows;
  std::size_t total = 0;
  for (const auto& text : texts) {
    total += text.size();
    for (std::size_t begin = 0; begin + width <= text.size(); begin += width) windows.push_back(text.data() + begin);
  }
  if (windows.size() < static_cast<std::size_t>(num_samples))
    throw_invalid("samples", "the text is too short: {} tokens are {} samples of {}, {} were asked for", total, windows.size(),
                  length, num_samples);
  TokenBatch batch(num_samples, length);
  for (int i = 0; i < num_samples; ++i)
    std::copy_n(windows[static_cast<std::size_t>(i) * windows.size() / static_cast<std::size_t>(num_samples)], width,
                batch.row(i).begin());
  return batch;
}

TokenBatch leading_windows(std::span<const std::int32_t> text, int num_windows, int length) {
  check_counts(num_windows, 0, length);
  const int possible = static_cast<int>(text.size() / static_cast<std::size_t>(length)),
            wanted = num_windows == 0 ? std::max(possible, 1) : num_windows;
  if (possible < wanted)
    throw_invalid("samples", "the text is too short: {} tokens are {} windows of {}, {} were asked for", text.size(), possible,
                  length, wanted);
  TokenBatch batch(wanted, length);
  std::copy_n(text.begin(), batch.tokens.size(), batch.tokens.begin());
  return batch;
}

}  // namespace veloxquant
