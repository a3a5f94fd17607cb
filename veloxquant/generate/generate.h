// Text that a model writes after a prompt.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "veloxquant/core/progress.h"
#include "veloxquant/model/language_model.h"

namespace veloxquant {

/// Tokens of a prompt that are read at once.
inline constexpr int kPromptChunk = 512;

struct GenerateOptions {
  int max_tokens = 256;
  double temperature = 0.0;                    // 0: the likeliest token
  double top_p = 1.0;                          // (0, 1]: only the likeliest tokens that have so much together (arXiv 1904.09751)
  std::vector<std::int32_t> stop_tokens = {};  // end the text, and are not part of it
  std::uint64_t seed = 0;
};

struct Generation {
  std::vector<std::int32_t> tokens;  // without the prompt and the stop token
  bool stopped = false;              // by a stop token
  int tokens_in_cache = 0;
  std::size_t cache_bytes = 0;                               // allocated for tokens, all layers
  double seconds_to_first_token = 0, tokens_per_second = 0;  // of those after the first
  std::vector<std::string> kernels;                          // of each layer, as AttentionCache::kernels() names them
};

/// Called with each token; false ends the text.
using TokenCallback = std::function<bool(std::int32_t token)>;

/// Reads the prompt in chunks of kPromptChunk tokens, reporting each layer of each, then writes token by token.  Same seed, same
/// text on one device.  Throws std::invalid_argument for an empty prompt, tokens outside the vocabulary and options out of range,
/// and std::runtime_error for logits that are not finite; warns where prompt and text together go beyond the model's maximum.
Generation generate(const LanguageModel& model, std::span<const std::int32_t> prompt, const CacheFactory& factory,
                    const GenerateOptions& options, const TokenCallback& on_token = {}, const ProgressCallback& progress = {});

/// One token of logits [vocab_size] by `uniform` in [0, 1), at temperature and top_p as GenerateOptions has them.
std::int32_t choose_token(std::span<const float> logits, double temperature, double top_p, double uniform);

}  // namespace veloxquant
