#include "veloxquant/evaluate/peers.h"

#include <fmt/ranges.h>

#include "mlx/ops.h"
#include "veloxquant/cache/restoring_cache.h"
#include "veloxquant/core/error.h"
#include "veloxquant/model/attention.h"
#include "veloxquant/quantize/registry.h"

namespace veloxquant {
namespace {

constexpr int kMlxGroup = 64;

// Seed of the random rotation of peers that have one.
constexpr std::uint64_t kPeerSeed = 0;

struct PeerFamily {
  std::string_view prefix;
  std::vector<int> widths;
  Storage (*make)(const std::string& name, int bits, const ModelConfig& config);
};

Storage mlx_peer(const std::string& name, int bits, const ModelConfig& config) {
  if (config.head_dim % kMlxGroup != 0)
    throw_invalid("evaluate", "{}: needs a head_dim that groups of {} divide, got {}", name, kMlxGroup, config.head_dim);
  const Restore restore{[bits](const mx::array& x) {
    const auto stored = mx::quantize(x, kMlxGroup, bits);
    return mx::dequantize(stored[0], stored[1], stored[2], kMlxGroup, bits);
  }};
  return {name, bits + 32.0 / kMlxGroup, [restore](int) { return std::make_unique<RestoringCache>(restore, restore); }};
}

Storage quantizer_peer(std::string_view method, const std::string& name, int bits, const ModelConfig& config) {
  const auto& quantizer = quantizer_method(method);
  const auto restore = [&](Side side) {
    return make_restore(quantizer.fit({}, config.head_dim, {.side = side, .width = static_cast<double>(bits), .seed = kPeerSeed}));
  };
  return {name, quantizer.rate(config.head_dim, bits), [keys = restore(Side::kKeys), values = restore(Side::kValues)](int) {
            return std::make_unique<RestoringCache>(keys, values);
          }};
}

Storage kivi_peer(const std::string& name, int bits, const ModelConfig& config) {
  return quantizer_peer("kivi", name, bits, config);
}

Storage turboquant_peer(const std::string& name, int bits, const ModelConfig& config) {
  return quantizer_peer("turboquant", name, bits, config);
}

const std::vector<PeerFamily>& peer_families() {
  static const std::vector<PeerFamily> table = {
      {"mlx", {2, 3, 4, 5, 6, 8}, mlx_peer},
      {"kivi", {1, 2, 3, 4}, kivi_peer},
      {"turboquant", {1, 2, 3, 4}, turboquant_peer},
  };
  return table;
}

}  // namespace

Storage full_storage() {
  return {"full", 32.0, FullCache::factory()};
}

std::vector<std::string> peer_names() {
  std::vector<std::string> names;
  for (const auto& family : peer_families())
    for (const int bits : family.widths) names.push_back(fmt::format("{}{}", family.prefix, bits));
  return names;
}

Storage peer_storage(const std::string& name, const ModelConfig& config) {
  for (const auto& family : peer_families())
    for (const int bits : family.widths)
      if (name == fmt::format("{}{}", family.prefix, bits)) return family.make(name, bits, config);
  throw_invalid("evaluate", "unknown peer \"{}\"; there are {}", name, fmt::join(peer_names(), ", "));
}

}  // namespace veloxquant
