// How far next-token distributions lie apart, from logits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace veloxquant {

struct Divergence {
  float kl;             // KL(p ‖ p̃) in nats, p of the reference; never negative
  float cross_entropy;  // −log p̃(target) in nats; 0 for the target −1
  std::int32_t top;     // argmax of the logits, the lowest of equal ones
};

/// reference and logits [rows, vocabulary], finite or −∞ (a token that cannot come; not all of a row); targets [rows] (−1: none)
/// → out [rows].  KL is exactly 0 for equal rows, and +∞ where the logits forbid what the reference allows.  Its error is about
/// 10⁻⁷ nats or 10⁻⁶ of it, whichever is more, since divergences of 10⁻⁵ are measured.
void divergence(const float* reference, const float* logits, const std::int32_t* targets, std::size_t vocabulary,
                std::span<Divergence> out);

namespace reference {
void divergence(const float* reference, const float* logits, const std::int32_t* targets, std::size_t vocabulary,
                std::span<Divergence> out);
}

}  // namespace veloxquant
