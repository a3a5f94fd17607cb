// What the CUDA kernels of any plan read of a layer (LayerTables in kernels/cuda/packed_units.h), in one array of words.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "veloxquant/model/rope.h"
#include "veloxquant/quantize/registry.h"
#include "veloxquant/quantize/rotated_pq.h"

namespace veloxquant {

/// Keys or values of a layer, of each KV head or one for all.  What they are made from must outlive this.
class LayerUnits {
 public:
  /// Makes the quantizers, on all threads.
  explicit LayerUnits(const std::vector<QuantizerParameters>& parameters);

  std::size_t size() const { return parameters_.size(); }
  const QuantizerParameters& parameters(std::size_t unit) const { return parameters_[unit]; }
  const Quantizer& quantizer(std::size_t unit) const { return *quantizers_[unit]; }

  /// All of them, where they are rotated_pq; else none.
  std::vector<const RotatedPqQuantizer*> rotated() const;

 private:
  const std::vector<QuantizerParameters>& parameters_;
  std::vector<std::unique_ptr<const Quantizer>> quantizers_;
};

struct LayerWords {
  std::vector<std::int32_t> words;
  int most_width;  // columns of the widest sub-space
};

/// Units that share tables where there is one for all KV heads.  Blocks are those of GraphCodec, errors in its order.  Or why the
/// kernels do not serve them: another method than rotated_pq and vecinfer with codes of 8 bits, more than kMostDim dimensions,
/// sub-spaces of more than kMostSubspace.
std::variant<LayerWords, std::string> layer_tables(const LayerUnits& keys, const LayerUnits& values, int kv_heads, int window, int sinks,
                                                   const Rope& rope);

}  // namespace veloxquant
