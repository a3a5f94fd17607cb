// Softmax over keys that come block by block.
#pragma once

#include <cstddef>

namespace veloxquant {

/// Scores [count] become weights e^(score − maximum), where maximum is raised to the largest score first and sum, of all weights so
/// far, goes along.  Returns by how much what was summed by earlier weights shrinks (FlashAttention, arXiv 2205.14135).
/// soft_cap c > 0: a score s becomes c·tanh(s / c) before.
float running_softmax(float* scores, std::size_t count, float soft_cap, float& maximum, float& sum);

namespace reference {
float running_softmax(float* scores, std::size_t count, float soft_cap, float& maximum, float& sum);
}

}  // namespace veloxquant
