#include "veloxquant/quantize/quantizer.h"

#include <vector>

namespace veloxquant {

void Quantizer::restore(std::span<const float> vectors, std::span<float> restored) const {
  std::vector<std::uint8_t> encoded(encoded_bytes(vectors.size() / static_cast<std::size_t>(dim())));
  encode(vectors, encoded);
  decode(encoded, restored);
}

}  // namespace veloxquant
