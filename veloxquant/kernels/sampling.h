// Drawing tokens from the distributions that logits stand for.
#pragma once

#include <cstddef>
#include <cstdint>

namespace veloxquant {

/// tokens [rows]: one of each row of logits [rows, vocabulary] with probability softmax(logits), the first whose cumulated
/// probability exceeds uniforms [rows], in [0, 1).  Logits finite or −∞, not all of a row −∞; a token of −∞ is never drawn.
void sample_tokens(const float* logits, const float* uniforms, std::size_t rows, std::size_t vocabulary, std::int32_t* tokens);

/// gradient [rows, vocabulary], may be logits: what log p(token) gains by the logits for a token drawn like that, which is 1 at the
/// token and 0 elsewhere, less softmax(logits).
void sampled_score(const float* logits, const float* uniforms, std::size_t rows, std::size_t vocabulary, float* gradient);

namespace reference {
void sample_tokens(const float* logits, const float* uniforms, std::size_t rows, std::size_t vocabulary, std::int32_t* tokens);
void sampled_score(const float* logits, const float* uniforms, std::size_t rows, std::size_t vocabulary, float* gradient);
}  // namespace reference

}  // namespace veloxquant
