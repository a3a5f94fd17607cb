// Blocks of product-quantised tokens: keys are scored by tables of a query's products, values summed by their entries.
#pragma once

#include <memory>

#include "veloxquant/cache/block_codec.h"

namespace veloxquant {

/// vecinfer with 256 or 16 centroids, codes of 8 or 4 bits.
bool has_vecinfer_codec(const QuantizerParameters& parameters);
std::shared_ptr<const BlockCodec> make_vecinfer_codec(const QuantizerParameters& parameters);

}  // namespace veloxquant
