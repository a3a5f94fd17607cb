#include "veloxquant/kernels/lut_scan.h"

namespace veloxquant::reference {

void scan_bytes(const float* products, std::size_t num_codes, const ScanCodes& codes, float scale, float* scores) {
  for (std::size_t t = 0; t < codes.tokens; ++t) {
    double sum = 0;
    for (std::size_t code = 0; code < num_codes; ++code)
      sum += products[code * 256 + codes.bytes[code * codes.stride + scan_place(t)]];
    scores[t] = scale * static_cast<float>(sum);
  }
}

void scan_nibbles(const float* products, std::size_t num_codes, const ScanCodes& codes, float scale, float* scores) {
  for (std::size_t t = 0; t < codes.tokens; ++t) {
    double sum = 0;
    for (std::size_t code = 0; code < num_codes; ++code)
      sum += products[code * 16 + (codes.bytes[code / 2 * codes.stride + scan_place(t)] >> (code % 2 * 4) & 15)];
    scores[t] = scale * static_cast<float>(sum);
  }
}

}  // namespace veloxquant::reference
