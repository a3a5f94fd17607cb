#include "veloxquant/cache/restore_graph.h"

#include <algorithm>
#include <vector>

#include "mlx/ops.h"
#include "veloxquant/cache/method_graph.h"
#include "veloxquant/quantize/rotated_pq.h"

namespace veloxquant {
namespace {

constexpr int kKiviGroup = 32;
constexpr int kComparisonsAtOnce = 1 << 25;

// The steps of quantize/kivi.cpp on groups [..., size].
mx::array restore_kivi_groups(const mx::array& x, int bits) {
  const auto low = mx::min(x, -1, true), high = mx::max(x, -1, true), stored_low = from_half_bits(half_bits(low));
  const auto step = from_half_bits(half_bits(mx::divide(mx::subtract(high, stored_low), number((1 << bits) - 1))));
  return mx::add(mx::multiply(codes_of(x, stored_low, step, bits), step), stored_low);
}

RestoreGraph kivi_graph(const QuantizerParameters& parameters) {
  const auto restore = [bits = bits_of(parameters)](const mx::array& x) {
    return out_of_groups(restore_kivi_groups(in_groups(x, kKiviGroup), bits), x.shape(-1));
  };
  if (parameters.side == Side::kValues) return restore;
  return [restore](const mx::array& x) { return mx::swapaxes(restore(mx::swapaxes(x, -1, -2)), -1, -2); };
}

// The worst of each block of tokens get 4-bit residuals: z and what was looked up of it, [B, H, T, dim] → patched.
mx::array patched(const mx::array& z, const mx::array& looked_up, int patches) {
  constexpr int kBlock = static_cast<int>(RotatedPqQuantizer::kBlockTokens);
  const auto rest = mx::subtract(z, looked_up);
  const auto errors = mx::sum(mx::square(rest), -1);  // [B, H, T]
  const int batch = z.shape(0), heads = z.shape(1), count = z.shape(2), whole = count / kBlock;
  // Blocks of `size` tokens each.
  std::vector<mx::array> worst;
  const auto choose = [&](int begin, int blocks, int size) {
    auto some = mx::reshape(mx::slice(errors, {0, 0, begin}, {batch, heads, begin + blocks * size}), {batch, heads, blocks, size});
    if (!worst.empty()) some = mx::depends({some}, {worst.back()})[0];
    const auto most = RotatedPqQuantizer::patches_of(static_cast<std::size_t>(patches), static_cast<std::size_t>(size));
    worst.push_back(mx::reshape(largest(some, static_cast<int>(most)), {batch, heads, blocks * size}));
  };
  // largest() compares each token of a block with each.
  const int step = std::max(1, kComparisonsAtOnce / (batch * heads * kBlock * kBlock));
  for (int block = 0; block < whole; block += step) choose(block * kBlock, std::min(step, whole - block), kBlock);
  if (whole * kBlock < count) choose(whole * kBlock, 1, count - whole * kBlock);
  const auto chosen = mx::expand_dims(worst.size() == 1 ? worst[0] : mx::concatenate(worst, -1), -1);
  return mx::where(chosen, mx::add(looked_up, look_up_patch(quantise_patch(rest))), looked_up);
}

}  // namespace

RestoreGraph restore_graph(const QuantizerParameters& parameters, const std::shared_ptr<const Quantizer>& quantizer) {
  if (parameters.method == "kivi") return kivi_graph(parameters);
  const int patches = parameters.method == "rotated_pq" ? static_cast<const RotatedPqQuantizer&>(*quantizer).patches() : 0;
  return [graph = method_graph(parameters, quantizer), patches](const mx::array& x) {
    const auto z = graph.forward(x), looked_up = graph.look_up(graph.quantise(z));
    return graph.back(patches > 0 ? patched(z, looked_up, patches) : looked_up, number(1));
  };
}

}  // namespace veloxquant
