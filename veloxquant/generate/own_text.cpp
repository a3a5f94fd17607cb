#include "veloxquant/generate/own_text.h"

#include <algorithm>

#include "mlx/ops.h"
#include "mlx/random.h"
#include "mlx/transforms.h"
#include "veloxquant/core/error.h"
#include "veloxquant/core/random.h"
#include "veloxquant/model/attention.h"
#include "veloxquant/model/sampling.h"

namespace veloxquant {
namespace {

// Sequences decoded together: enough to keep the matrix products busy,
constexpr int kBatch = 32;

// and few enough that their keys and values stay within this.
std::size_t cache_budget() {
  return mx::default_device() == mx::Device::gpu ? std::size_t{16} << 30 : std::size_t{768} << 20;
}

// As even as batches within both limits can be.
int batch_size(const ModelConfig& config, int num_samples, int length) {
  const std::size_t bytes = 2 * sizeof(float) * static_cast<std::size_t>(config.num_layers) *
                            static_cast<std::size_t>(config.num_kv_heads) * static_cast<std::size_t>(config.head_dim) *
                            static_cast<std::size_t>(length);
  const int most = static_cast<int>(std::clamp<std::size_t>(cache_budget() / bytes, 1, kBatch)),
            batches = (num_samples + most - 1) / most;
  return (num_samples + batches - 1) / batches;
}

int first_token(const ModelConfig& config) {
  const auto token = config.bos_token_id ? config.bos_token_id : config.eos_token_id;
  if (!token) throw_failure("own text", "config.json has neither bos_token_id nor eos_token_id to start from: pass a text instead");
  return *token;
}

// Decodes one batch; columns of the result are tokens.
void decode_batch(const LanguageModel& model, int batch, const mx::array& key, TokenBatch& samples, int first_row,
                  ProgressStage& stage) {
  const AttentionCaches caches = model.make_caches(FullCache::factory());
  mx::array token = mx::full({batch, 1}, first_token(model.config()), mx::int32);
  const auto uniforms = mx::random::uniform({samples.length, batch}, mx::float32, key);
  for (int t = 0; t < samples.length; ++t) {
    if (t > 0) {
      const auto logits = mx::reshape(model.logits(model.forward(token, caches)), {batch, model.config().vocab_size});
      token = mx::reshape(sample_tokens(logits, mx::reshape(mx::slice(uniforms, {t, 0}, {t + 1, batch}), {batch})), {batch, 1});
    }
    mx::eval(token);
    for (int row = 0; row < batch; ++row) samples.row(first_row + row)[t] = token.data<std::int32_t>()[row];
    stage.advance(batch);
  }
}

}  // namespace

TokenBatch generate_own_text(const LanguageModel& model, int num_samples, int length, std::uint64_t seed,
                             const ProgressCallback& progress) {
  if (num_samples < 1) throw_invalid("own text", "expected at least 1 sample, got {}", num_samples);
  const int longest = model.config().max_position_embeddings;
  if (length < 1 || length > longest)
    throw_invalid("own text", "expected a length of 1 to {} (the model's maximum), got {}", longest, length);
  TokenBatch samples(num_samples, length);
  ProgressStage stage(progress, "writing own text", static_cast<std::size_t>(num_samples) * length);
  const int batch = batch_size(model.config(), num_samples, length);
  for (int first = 0; first < num_samples; first += batch) {
    const auto key = mx::random::key(Random(seed, static_cast<std::uint64_t>(first)).next());
    decode_batch(model, std::min(batch, num_samples - first), key, samples, first, stage);
  }
  return samples;
}

}  // namespace veloxquant
