#include "veloxquant/calibrate/calibration_samples.h"

#include "veloxquant/core/error.h"
#include "veloxquant/generate/own_text.h"

namespace veloxquant {

TokenBatch calibration_samples(const Model& model, const Tokenizer& tokenizer, const std::vector<std::string>& texts,
                               int num_samples, int length, std::uint64_t seed, const ProgressCallback& progress) {
  if (texts.empty()) return generate_own_text(model, num_samples, length, seed, progress);
  const int longest = model.config().max_position_embeddings;
  if (length > longest) throw_invalid("samples", "length: expected at most {} (the model's maximum), got {}", longest, length);
  std::vector<std::vector<std::int32_t>> tokens;
  for (const auto& text : texts) tokens.push_back(tokenizer.encode(text));
  return cut_samples(tokens, num_samples, length);
}

}  // namespace veloxquant
