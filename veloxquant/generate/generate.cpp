#include "veloxquant/generate/generate.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <numeric>

#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "veloxquant/core/error.h"
#include "veloxquant/core/random.h"
#include "veloxquant/core/warning.h"

namespace veloxquant {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

void check(const LanguageModel& model, std::span<const std::int32_t> prompt, const GenerateOptions& options) {
  if (prompt.empty()) throw_invalid("generate", "prompt: expected at least one token, got none");
  const int vocabulary = model.config().vocab_size, longest = model.config().max_position_embeddings;
  for (const auto token : prompt)
    if (token < 0 || token >= vocabulary)
      throw_invalid("generate", "prompt: expected tokens from 0 to {}, got {}", vocabulary - 1, token);
  if (options.max_tokens < 1) throw_invalid("generate", "max_tokens: expected at least 1, got {}", options.max_tokens);
  if (!(options.temperature >= 0) || !std::isfinite(options.temperature))
    throw_invalid("generate", "temperature: expected a number from 0, got {}", options.temperature);
  if (!(options.top_p > 0 && options.top_p <= 1))
    throw_invalid("generate", "top_p: expected a number above 0, at most 1, got {}", options.top_p);
  if (const auto all = prompt.size() + static_cast<std::size_t>(options.max_tokens); all > static_cast<std::size_t>(longest))
    warn(fmt::format("prompt and text are up to {} tokens, and the model was made for {}: what lies beyond may make no sense", all,
                     longest));
}

mx::array token_row(std::span<const std::int32_t> tokens) {
  return mx::array(tokens.data(), {1, static_cast<int>(tokens.size())}, mx::int32);
}

// Logits [vocab_size] of the last of the tokens whose hidden states [1, T, hidden_size] are given.
std::vector<float> last_logits(const LanguageModel& model, const mx::array& hidden) {
  const int count = hidden.shape(1);
  auto logits = mx::contiguous(model.logits(mx::slice(hidden, {0, count - 1, 0}, {1, count, hidden.shape(2)})));
  logits.eval();
  std::vector<float> values(logits.data<float>(), logits.data<float>() + logits.size());
  // −∞ is a token that cannot come.
  const auto wrong =
      std::find_if(values.begin(), values.end(), [](float x) { return !(x < std::numeric_limits<float>::infinity()); });
  if (wrong != values.end())
    throw_failure("generate", "expected finite logits, got {} for token {}: float32 overflows", *wrong, wrong - values.begin());
  return values;
}

std::vector<float> read_prompt(const LanguageModel& model, std::span<const std::int32_t> prompt, const AttentionCaches& caches,
                               const ProgressCallback& progress) {
  ProgressStage stage(progress, "reading the prompt", prompt.size() * caches.size());
  for (;; prompt = prompt.subspan(kPromptChunk)) {
    const auto chunk = prompt.first(std::min<std::size_t>(kPromptChunk, prompt.size()));
    const auto hidden = model.forward_by_layers(token_row(chunk), caches, [&] { stage.advance(chunk.size()); });
    if (chunk.size() == prompt.size()) return last_logits(model, hidden);
  }
}

// Once, which layers kernels of ours do not serve though they could, and why.
void warn_of_graphs(const AttentionCaches& caches) {
  std::map<std::string, std::vector<std::size_t>> layers;
  for (std::size_t layer = 0; layer < caches.size(); ++layer)
    if (auto why = caches[layer]->no_kernels(); !why.empty()) layers[why].push_back(layer);
  for (const auto& [why, some] : layers)
    warn(fmt::format("layers {} attend to their codes by operations of MLX, which is slower: {}", fmt::join(some, ", "), why));
}

}  // namespace

std::int32_t choose_token(std::span<const float> logits, double temperature, double top_p, double uniform) {
  const auto best = static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
  if (temperature == 0) return best;
  const double top = logits[static_cast<std::size_t>(best)];
  std::vector<double> weights(logits.size());
  for (std::size_t i = 0; i < logits.size(); ++i) weights[i] = std::exp((logits[i] - top) / temperature);
  const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
  std::vector<std::int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::size_t kept = order.size();
  double mass = total;
  if (top_p < 1) {
    std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
      return weights[static_cast<std::size_t>(a)] > weights[static_cast<std::size_t>(b)];
    });
    mass = 0;
    for (kept = 0; kept < order.size() && (kept == 0 || mass < top_p * total); ++kept)
      mass += weights[static_cast<std::size_t>(order[kept])];
  }
  double left = uniform * mass;
  for (std::size_t i = 0; i < kept; ++i) {
    left -= weights[static_cast<std::size_t>(order[i])];
    if (left < 0) return order[i];
  }
  return best;  // rounding
}

Generation generate(const LanguageModel& model, std::span<const std::int32_t> prompt, const CacheFactory& factory,
                    const GenerateOptions& options, const TokenCallback& on_token, const ProgressCallback& progress) {
  check(model, prompt, options);
  const auto begin = Clock::now();
  const auto caches = model.make_caches(factory);
  auto logits = read_prompt(model, prompt, caches, progress);
  warn_of_graphs(caches);
  Generation result;
  auto first = begin;
  Random random(options.seed);
  while (static_cast<int>(result.tokens.size()) < options.max_tokens) {
    const std::int32_t token = choose_token(logits, options.temperature, options.top_p, random.uniform());
    result.stopped = std::find(options.stop_tokens.begin(), options.stop_tokens.end(), token) != options.stop_tokens.end();
    if (result.stopped) break;
    result.tokens.push_back(token);
    if (result.tokens.size() == 1) {
      result.seconds_to_first_token = seconds_since(begin);
      first = Clock::now();
    }
    if (on_token && !on_token(token)) break;
    limit_kept_buffers();
    if (static_cast<int>(result.tokens.size()) < options.max_tokens)
      logits = last_logits(model, model.forward(token_row({&token, 1}), caches));
  }
  if (result.tokens.size() > 1) result.tokens_per_second = static_cast<double>(result.tokens.size() - 1) / seconds_since(first);
  result.tokens_in_cache = caches.at(0)->offset();
  for (const auto& cache : caches) {
    result.cache_bytes += cache->nbytes();
    result.kernels.push_back(cache->kernels());
  }
  return result;
}

}  // namespace veloxquant
