#include "veloxquant/plan/plan.h"

#include <fmt/format.h>

#include <algorithm>

#include "veloxquant/core/error.h"

namespace veloxquant {

namespace {

constexpr int kExactBits = 8;
constexpr int kMostExactTokens = 65536;

int heads_of(const Plan& plan, const UnitPlan& unit) {
  return unit.head ? 1 : plan.model.num_kv_heads;
}

constexpr int kFullBytes = 2;  // of an element that is left as it is

std::int64_t elements_per_token(const Plan& plan) {
  const auto layers = static_cast<std::int64_t>(plan.model.num_layers) - static_cast<std::int64_t>(plan.sliding.size());
  return 2 * layers * plan.model.num_kv_heads * plan.model.head_dim;
}

}  // namespace

QuantizerParameters exact_parameters(Side side, int head_dim) {
  return quantizer_method("affine").fit({}, head_dim, {.side = side, .width = kExactBits});
}

std::int64_t cache_bytes(const Plan& plan, std::int64_t tokens) {
  const std::int64_t exact = std::min<std::int64_t>(tokens, plan.window + plan.sinks);
  std::size_t bytes = 0;
  for (const auto& unit : plan.units) {
    const auto of = [&](const QuantizerParameters& parameters, std::int64_t count) {
      return make_quantizer(parameters)->encoded_bytes(static_cast<std::size_t>(count));
    };
    const std::size_t one_head =
        of(unit.quantizer, tokens - exact) + (exact > 0 ? of(exact_parameters(unit.side, plan.model.head_dim), exact) : 0);
    bytes += static_cast<std::size_t>(heads_of(plan, unit)) * one_head;
  }
  return static_cast<std::int64_t>(bytes);
}

std::int64_t full_bytes(const Plan& plan, std::int64_t tokens) {
  return tokens * elements_per_token(plan) * kFullBytes;
}

std::int64_t sliding_bytes(const ModelIdentity& model, const std::vector<SlidingLayer>& sliding, std::int64_t tokens) {
  std::int64_t bytes = 0;
  for (const auto& layer : sliding)
    bytes += std::min<std::int64_t>(tokens, layer.window) * 2 * model.num_kv_heads * model.head_dim * kFullBytes;
  return bytes;
}

double effective_bits(const Plan& plan, std::int64_t tokens) {
  if (plan.units.empty() || tokens < 1) return 0.0;
  return 8.0 * static_cast<double>(cache_bytes(plan, tokens)) / static_cast<double>(tokens * elements_per_token(plan));
}

double effective_bits(const Plan& plan) {
  return effective_bits(plan, plan.provenance.context);
}

std::size_t constant_bytes(const Plan& plan) {
  std::size_t bytes = 0;
  for (const auto& unit : plan.units) {
    for (const auto& [name, tensor] : unit.quantizer.tensors) bytes += tensor.values.size() * sizeof(float);
    for (const auto& [name, tensor] : unit.quantizer.byte_tensors) bytes += tensor.values.size();
  }
  return bytes;
}

double bytes_per_token(const Plan& plan) {
  double bytes = 0;
  for (const auto& unit : plan.units)
    bytes += make_quantizer(unit.quantizer)->rate() * plan.model.head_dim * heads_of(plan, unit) / 8;
  return bytes;
}

void check_identity(const Plan& plan, const ModelIdentity& model) {
  const auto compare = [](const char* field, const auto& in_plan, const auto& in_model) {
    if (in_plan != in_model)
      throw_failure("plan", "was made for another model: {} is {} in the plan, {} in the model", field, in_plan, in_model);
  };
  compare("architecture", plan.model.architecture, model.architecture);
  compare("num_layers", plan.model.num_layers, model.num_layers);
  compare("num_kv_heads", plan.model.num_kv_heads, model.num_kv_heads);
  compare("head_dim", plan.model.head_dim, model.head_dim);
  compare("hidden_size", plan.model.hidden_size, model.hidden_size);
  compare("vocab_size", plan.model.vocab_size, model.vocab_size);
  const auto compare_known = [&](const char* field, const std::string& in_plan, const std::string& in_model) {
    if (!in_plan.empty() && !in_model.empty()) compare(field, in_plan, in_model);
  };
  compare_known("config_hash", plan.model.config_hash, model.config_hash);
  compare_known("weights_hash", plan.model.weights_hash, model.weights_hash);
}

namespace {

std::string unit_name(int layer, Side side, std::optional<int> head) {
  return fmt::format("{} of layer {}{}", to_string(side), layer, head ? fmt::format(", head {}", *head) : "");
}

void check_unit(const Plan& plan, std::size_t at, int layer, Side side, std::optional<int> head) {
  if (at >= plan.units.size()) throw_invalid("plan", "units[{}]: expected {}, got none", at, unit_name(layer, side, head));
  const UnitPlan& unit = plan.units[at];
  if (unit.layer != layer || unit.side != side || unit.quantizer.side != side || unit.head != head)
    throw_invalid("plan", "units[{}]: expected {}, got {}", at, unit_name(layer, side, head),
                  unit_name(unit.layer, unit.side, unit.head));
  if (unit.quantizer.dim != plan.model.head_dim)
    throw_invalid("plan", "units[{}]: dim: expected the head_dim {}, got {}", at, plan.model.head_dim, unit.quantizer.dim);
  try {
    make_quantizer(unit.quantizer);
  } catch (const std::invalid_argument& error) {
    throw_invalid("plan", "units[{}]: {}", at, error.what());
  }
}

}  // namespace

void check_plan(const Plan& plan) {
  for (const auto& [name, tokens] : {std::pair("window", plan.window), std::pair("sinks", plan.sinks)})
    if (tokens < 0 || tokens > kMostExactTokens)
      throw_invalid("plan", "{}: expected 0 to {}, got {}", name, kMostExactTokens, tokens);
  for (std::size_t i = 0; i < plan.sliding.size(); ++i) {
    const auto& [layer, window] = plan.sliding[i];
    const int least = i > 0 ? plan.sliding[i - 1].layer + 1 : 0;
    if (layer < least || layer >= plan.model.num_layers)
      throw_invalid("plan", "sliding[{}]: layer: expected {} to {}, got {}", i, least, plan.model.num_layers - 1, layer);
    if (window < 1) throw_invalid("plan", "sliding[{}]: window: expected at least 1, got {}", i, window);
  }
  const auto slides = [&](int layer) {
    return std::any_of(plan.sliding.begin(), plan.sliding.end(), [layer](const auto& some) { return some.layer == layer; });
  };
  std::size_t at = 0;
  for (int layer = 0; layer < plan.model.num_layers; ++layer) {
    if (slides(layer)) continue;
    for (const Side side : {Side::kKeys, Side::kValues}) {
      const bool per_head = at < plan.units.size() && plan.units[at].head;
      for (int head = 0; head < (per_head ? plan.model.num_kv_heads : 1); ++head, ++at)
        check_unit(plan, at, layer, side, per_head ? std::optional(head) : std::nullopt);
    }
  }
  if (at == 0) throw_invalid("plan", "units: expected some, got none: every layer slides");
  if (at != plan.units.size())
    throw_invalid("plan", "units: expected {} for {} layers, got {}", at,
                  plan.model.num_layers - static_cast<int>(plan.sliding.size()), plan.units.size());
}

}  // namespace veloxquant
