// Quantise-and-restore as a graph of MLX's operations, for back ends where our CPU code does not run.
#pragma once

#include <functional>
#include <memory>

#include "mlx/array.h"
#include "veloxquant/model/device.h"
#include "veloxquant/quantize/registry.h"

namespace veloxquant {

using RestoreGraph = std::function<mx::array(const mx::array& x)>;

/// x [B, H, T, D] → what `quantizer`, made from `parameters`, gives back of it, to float precision; a vector within rounding of a
/// boundary between two codes may get the other one.  Runs on any device.  Every method of quantizer_methods() has one:
/// KIVI here, the others in the table of method_graph.cpp; throws std::logic_error for another.
RestoreGraph restore_graph(const QuantizerParameters& parameters, const std::shared_ptr<const Quantizer>& quantizer);

}  // namespace veloxquant
