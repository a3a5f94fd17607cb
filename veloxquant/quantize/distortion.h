// How much of the data a quantizer loses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "veloxquant/quantize/registry.h"

namespace veloxquant {

/// Mean squared error of what `method` gives back at each of `rates`, relative to the mean square of the data; 0 if the data is all
/// zero.  vectors: runs of `run_tokens` tokens [runs, run_tokens, dim], quantised one by one.  At a rate between two widths of the
/// method the channels alternate between them: with f the share of the wider one, channel c takes it where ⌊(c + 1)·f⌋ > ⌊c·f⌋.
/// Throws std::invalid_argument for a rate (bits of codes an element) beyond the method's widths, and for vectors that are not
/// whole runs.
std::vector<double> relative_distortions(const QuantizerMethod& method, Side side, std::span<const float> vectors,
                                         std::size_t run_tokens, int dim, const std::vector<double>& rates, std::uint64_t seed);

/// The same for a quantizer that is fitted already.
double restored_distortion(const Quantizer& quantizer, std::span<const float> vectors, std::size_t run_tokens);

}  // namespace veloxquant
