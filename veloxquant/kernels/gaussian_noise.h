// Gaussian noise that is a function of its place alone.
#pragma once

#include <cstddef>
#include <cstdint>

namespace veloxquant {

/// out[i] = x[i] + deviation · n(seed, i) for i < count < 2^32; out may be x.  n is standard normal: with h₁ and h₂ two hashes of i
/// by MurmurHash3's finaliser, n = √(−2 ln((h₁ / 256 + ½) / 2^24)) · cos(2π · h₂ / 2^32) (Box and Muller 1958).  Integers until
/// then, so that every device draws the same, to float precision.
void add_gaussian_noise(const float* x, std::size_t count, float deviation, std::uint64_t seed, float* out);

/// What hash number 1 or 2 of index i is made from: the hash is that of i · kNoiseStride + salt.
constexpr std::uint32_t kNoiseStride = 0x9E3779B1;
std::uint32_t noise_salt(std::uint64_t seed, int number);

namespace reference {
void add_gaussian_noise(const float* x, std::size_t count, float deviation, std::uint64_t seed, float* out);
}

}  // namespace veloxquant
