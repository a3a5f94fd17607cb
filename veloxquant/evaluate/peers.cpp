#include "veloxquant/evaluate/peers.h"

#include <fmt/ranges.h>

#include <algorithm>

#include "mlx/ops.h"
#include "veloxquant/cache/packed_cache.h"
#include "veloxquant/cache/restoring_cache.h"
#include "veloxquant/calibrate/make_plan.h"
#include "veloxquant/core/error.h"
#include "veloxquant/generate/own_text.h"
#include "veloxquant/model/attention.h"
#include "veloxquant/quantize/registry.h"

namespace veloxquant {
namespace {

constexpr int kMlxGroup = 64;

// Seed of the random rotation of peers that have one, and of K-means.
constexpr std::uint64_t kPeerSeed = 0;

// Own text that a peer is fitted to.  Seeds of texts that are evaluated or calibrated on are drawn or small: none is this one.
constexpr std::uint64_t kPeerTextSeed = 0x7065657274657874;
constexpr int kPeerSamples = 32, kPeerLength = 512;

// NAME+window keeps these.
constexpr const char* kWindowSuffix = "+window";

struct Request {
  std::string name;
  int bits;
  bool windowed;
  const LanguageModel& model;
  const ProgressCallback& progress;
};

struct PeerFamily {
  std::string_view prefix;
  std::vector<int> widths;
  bool takes_window;
  Storage (*make)(const Request& request);
};

// The peer that restores so; bits(context) are its own, without the window.
Storage restoring_peer(const Request& request, const Restore& keys, const Restore& values, std::function<double(int)> bits) {
  const auto& config = request.model.config();
  if (stored_layers(config, /* sliding= */ false).empty())
    throw_invalid("evaluate", "{}: would store nothing, since all {} layers have a sliding window and stay as they are",
                  request.name, config.num_layers);
  const ExactTokens exact = request.windowed ? ExactTokens{kDefaultWindow, kDefaultSinks} : ExactTokens{};
  // As of a plan, layers that slide stay as they are.
  const CacheFactory factory = [=, layers = config.layers](int layer) -> std::unique_ptr<AttentionCache> {
    if (layers[static_cast<std::size_t>(layer)].sliding_window > 0) return std::make_unique<FullCache>();
    return std::make_unique<RestoringCache>(keys, values, exact);
  };
  Storage storage{.name = request.name,
                  .factory = factory,
                  .effective_bits = bits,
                  .sliding = sliding_layers(config, /* quantize_sliding= */ false)};
  if (!request.windowed) return storage;
  const double exact_bits = make_quantizer(exact_parameters(Side::kKeys, config.head_dim))->rate();
  storage.effective_bits = [=](int context) { return windowed_bits(bits, exact_bits, context, kDefaultWindow + kDefaultSinks); };
  return storage;
}

Storage mlx_peer(const Request& request) {
  const int head_dim = request.model.config().head_dim, bits = request.bits;
  if (head_dim % kMlxGroup != 0)
    throw_invalid("evaluate", "{}: needs a head_dim that groups of {} divide, got {}", request.name, kMlxGroup, head_dim);
  const Restore restore{[bits](const mx::array& x) {
    const auto stored = mx::quantize(x, kMlxGroup, bits);
    return mx::dequantize(stored[0], stored[1], stored[2], kMlxGroup, bits);
  }};
  return restoring_peer(request, restore, restore, [bits](int) { return bits + 32.0 / kMlxGroup; });
}

Storage quantizer_peer(std::string_view method, const Request& request) {
  const auto fit = [&](Side side) {
    return quantizer_method(method).fit({}, request.model.config().head_dim,
                                        {.side = side, .width = static_cast<double>(request.bits), .seed = kPeerSeed});
  };
  const auto keys = fit(Side::kKeys), values = fit(Side::kValues);
  const std::shared_ptr<const Quantizer> key_quantizer = make_quantizer(keys), value_quantizer = make_quantizer(values);
  // A last group of tokens that is not full costs as much as a full one.
  const auto bits = [key_quantizer, value_quantizer](int context) {
    const auto tokens = static_cast<std::size_t>(context);
    const auto bytes = static_cast<double>(key_quantizer->encoded_bytes(tokens) + value_quantizer->encoded_bytes(tokens));
    return 8 * bytes / (2.0 * static_cast<double>(tokens) * key_quantizer->dim());
  };
  return restoring_peer(request, make_restore(keys), make_restore(values), bits);
}

Storage kivi_peer(const Request& request) {
  return quantizer_peer("kivi", request);
}

Storage turboquant_peer(const Request& request) {
  return quantizer_peer("turboquant", request);
}

Storage vecinfer_peer(const Request& request) {
  const PlanOptions options{.method = "vecinfer", .bits = static_cast<double>(request.bits), .seed = kPeerSeed};
  const auto& config = request.model.config();
  const int length = std::min(kPeerLength, config.max_position_embeddings);
  check_plan_options(config, options, kPeerSamples, length);
  const auto samples = generate_own_text(request.model, kPeerSamples, length, kPeerTextSeed, request.progress);
  return plan_storage(request.name, make_plan(request.model, samples, options, request.progress));
}

const std::vector<PeerFamily>& peer_families() {
  static const std::vector<PeerFamily> table = {
      {"mlx", {2, 3, 4, 5, 6, 8}, true, mlx_peer},
      {"kivi", {1, 2, 3, 4}, true, kivi_peer},
      {"turboquant", {1, 2, 3, 4}, true, turboquant_peer},
      {"vecinfer", {1, 2, 4}, false, vecinfer_peer},
  };
  return table;
}

std::string name_of(const PeerFamily& family, int bits, bool windowed) {
  return fmt::format("{}{}{}", family.prefix, bits, windowed ? kWindowSuffix : "");
}

}  // namespace

Storage full_storage() {
  return {"full", FullCache::factory(), [](int) { return 32.0; }};
}

Storage plan_storage(const std::string& name, const Plan& plan, bool packed) {
  const auto kept = std::make_shared<const Plan>(plan);
  return {name, packed ? packed_factory(plan) : restoring_factory(plan),
          [kept](int context) { return effective_bits(*kept, context); }, constant_bytes(plan), plan.sliding};
}

std::vector<std::string> peer_names() {
  std::vector<std::string> names;
  for (const bool windowed : {false, true})
    for (const auto& family : peer_families())
      if (!windowed || family.takes_window)
        for (const int bits : family.widths) names.push_back(name_of(family, bits, windowed));
  return names;
}

Storage peer_storage(const std::string& name, const LanguageModel& model, const ProgressCallback& progress) {
  for (const bool windowed : {false, true})
    for (const auto& family : peer_families())
      for (const int bits : family.widths)
        if ((!windowed || family.takes_window) && name == name_of(family, bits, windowed))
          return family.make({name, bits, windowed, model, progress});
  throw_invalid("evaluate", "unknown peer \"{}\"; there are {}", name, fmt::join(peer_names(), ", "));
}

double windowed_bits(const std::function<double(int)>& bits, double exact_bits, int context, int exact_tokens) {
  const int kept = std::min(context, exact_tokens), coded = context - kept;
  return (kept * exact_bits + (coded > 0 ? coded * bits(coded) : 0.0)) / context;
}

}  // namespace veloxquant
