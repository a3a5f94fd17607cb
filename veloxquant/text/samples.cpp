#include "veloxquant/text/samples.h"

#include <algorithm>
#include <limits>
#include <string_view>

#include "veloxquant/core/error.h"

namespace veloxquant {
namespace {

// Token ids alone then take a gibibyte, and what is computed from them many times that.
constexpr std::int64_t kMaxTokens = std::int64_t{1} << 28;

using Texts = std::span<const std::span<const std::int32_t>>;

using Prefix = std::span<const std::int32_t>;

void check_counts(std::string_view what, int count, int least, int length, Prefix prefix) {
  if (count < least) throw_invalid("samples", "{}: expected at least {}, got {}", what, least, count);
  if (length < 1) throw_invalid("samples", "length: expected at least 1 token, got {}", length);
  if (static_cast<std::size_t>(length) <= prefix.size())
    throw_invalid("samples", "length: expected more than the {} tokens that the tokenizer puts before a text, got {}",
                  prefix.size(), length);
}

// Tokens of a text in a window of `length`.
std::size_t text_width(int length, Prefix prefix) {
  return static_cast<std::size_t>(length) - prefix.size();
}

void fill(std::span<std::int32_t> row, Prefix prefix, const std::int32_t* text) {
  const auto rest = std::copy(prefix.begin(), prefix.end(), row.begin());
  std::copy_n(text, row.size() - prefix.size(), rest);
}

std::size_t count_windows(Texts texts, std::size_t length) {
  std::size_t count = 0;
  for (const auto& text : texts) count += text.size() / length;
  return count;
}

// The greatest length at which there are `count` windows; 0 if there is none.
std::size_t longest_window(Texts texts, std::size_t count) {
  std::size_t fits = 0, too_long = 1;
  for (const auto& text : texts) too_long = std::max(too_long, text.size() + 1);
  while (fits + 1 < too_long) {
    const std::size_t middle = fits + (too_long - fits) / 2;
    (count_windows(texts, middle) >= count ? fits : too_long) = middle;
  }
  return fits;
}

void check_enough(Texts texts, std::string_view what, int count, int length, Prefix prefix) {
  const auto wanted = static_cast<std::size_t>(count), width = text_width(length, prefix);
  const std::size_t possible = count_windows(texts, width);
  if (possible >= wanted) return;
  std::size_t tokens = 0;
  for (const auto& text : texts) tokens += text.size();
  throw_invalid(
      "samples",
      "the text is too short: {} {} of {} tokens need {} tokens without overlap, it has {}; possible are at most {} {} of that "
      "length, or a length of at most {} for that many",
      count, what, length, wanted * width, tokens, possible, what, longest_window(texts, wanted) + prefix.size());
}

}  // namespace

void check_batch_size(int count, int length) {
  if (std::int64_t{count} * length > kMaxTokens)
    throw_invalid("samples", "expected at most {} sequences of {} tokens, got {}", kMaxTokens / length, length, count);
}

TokenBatch::TokenBatch(int count, int length) : count(count), length(length) {
  check_batch_size(count, length);
  tokens.resize(static_cast<std::size_t>(count) * static_cast<std::size_t>(length));
}

TokenBatch cut_samples(const std::vector<std::vector<std::int32_t>>& texts, int num_samples, int length, Prefix prefix) {
  check_counts("num_samples", num_samples, 1, length, prefix);
  const std::vector<std::span<const std::int32_t>> spans(texts.begin(), texts.end());
  check_enough(spans, "samples", num_samples, length, prefix);
  const std::size_t width = text_width(length, prefix);
  std::vector<const std::int32_t*> windows;
  for (const auto& text : texts)
    for (std::size_t begin = 0; begin + width <= text.size(); begin += width) windows.push_back(text.data() + begin);
  TokenBatch batch(num_samples, length);
  for (int i = 0; i < num_samples; ++i) {
    const auto window = static_cast<std::size_t>(i) * windows.size() / static_cast<std::size_t>(num_samples);
    fill(batch.row(i), prefix, windows[window]);
  }
  return batch;
}

TokenBatch leading_windows(std::span<const std::int32_t> text, int num_windows, int length, Prefix prefix) {
  check_counts("num_windows", num_windows, 0, length, prefix);
  const std::size_t width = text_width(length, prefix);
  const auto all = std::min<std::size_t>(text.size() / width, std::numeric_limits<int>::max());
  const int wanted = num_windows > 0 ? num_windows : std::max(static_cast<int>(all), 1);
  check_enough({&text, 1}, "windows", wanted, length, prefix);
  TokenBatch batch(wanted, length);
  for (int i = 0; i < wanted; ++i) fill(batch.row(i), prefix, text.data() + static_cast<std::size_t>(i) * width);
  return batch;
}

std::vector<std::int32_t> text_of(const TokenBatch& batch, Prefix prefix) {
  std::vector<std::int32_t> text;
  for (int i = 0; i < batch.count; ++i) {
    auto row = batch.row(i);
    if (row.size() >= prefix.size() && std::ranges::equal(row.first(prefix.size()), prefix)) row = row.subspan(prefix.size());
    text.insert(text.end(), row.begin(), row.end());
  }
  return text;
}

}  // namespace veloxquant
