#include "veloxquant/plan/plan_summary.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <iterator>
#include <map>
#include <numeric>
#include <utility>
#include <vector>

#include "veloxquant/core/text_table.h"
#include "veloxquant/plan/layer_map.h"

namespace veloxquant {
namespace {

double bits_of(const UnitPlan& unit) {
  return make_quantizer(unit.quantizer)->rate();
}

// Of the units of one side of a layer: the mean, and the range where they differ.
std::string side_bits(const Plan& plan, int layer, Side side) {
  std::vector<double> bits;
  for (const auto& unit : plan.units)
    if (unit.layer == layer && unit.side == side) bits.push_back(bits_of(unit));
  const auto [low, high] = std::minmax_element(bits.begin(), bits.end());
  const double mean = std::accumulate(bits.begin(), bits.end(), 0.0) / static_cast<double>(bits.size());
  if (*low == *high) return fmt::format("{:.4g}", mean);
  if (bits.size() <= 4) return fmt::format("{:.3g}", fmt::join(bits, " / "));
  return fmt::format("{:.3g} ({:.3g} to {:.3g})", mean, *low, *high);
}

std::string units_text(const std::string& units) {
  static const std::map<std::string, std::string> words = {{"uniform", "one width for all layers"},
                                                           {"layer", "a width per layer"},
                                                           {"kv", "a width for each layer's keys and one for its values"},
                                                           {"head", "a width for each head's keys and one for its values"}};
  return words.at(units);
}

std::string exact_text(const Plan& plan) {
  if (plan.window + plan.sinks == 0) return "";
  return fmt::format("; the last {} and first {} tokens at 8 bits", plan.window, plan.sinks);
}

// The units that lose most, where that was predicted for each.
std::string units_at_stake(const Plan& plan) {
  constexpr std::size_t kShown = 8;
  std::vector<const UnitPlan*> units;
  for (const auto& unit : plan.units)
    if (unit.predicted_kl) units.push_back(&unit);
  if (units.empty()) return "";
  std::stable_sort(units.begin(), units.end(), [](const auto* a, const auto* b) { return *a->predicted_kl > *b->predicted_kl; });
  units.resize(std::min(units.size(), kShown));
  std::vector<std::vector<std::string>> rows = {{"most at stake", "bits", "predicted KL"}};
  for (const auto* unit : units)
    rows.push_back({unit_name(unit->layer, unit->side, unit->head), fmt::format("{:.3g}", bits_of(*unit)),
                    fmt::format("{:.6f}", *unit->predicted_kl)});
  return "\n" + table(rows);
}

std::string samples_text(const Provenance& from) {
  if (from.num_samples == 0) return "without samples, which would not change it";
  std::vector<std::string> names;
  // rotated_pq mixes the user's texts with the model's own (calibration_set).
  if (from.texts.empty() || from.method == "rotated_pq") names.push_back("the model's own text");
  for (const auto& text : from.texts) names.push_back(text.name);
  return fmt::format("on {}: {} samples of {} tokens", fmt::join(names, ", "), from.num_samples, from.sequence_length);
}

}  // namespace

std::string unit_name(int layer, Side side, std::optional<int> head) {
  return fmt::format("{} {}{}", layer_name(layer), to_string(side), head ? fmt::format(" head {}", *head) : "");
}

std::string plan_summary(const Plan& plan) {
  std::string text;
  const auto say = [&text]<class... Args>(fmt::format_string<Args...> form, Args&&... args) {
    fmt::format_to(std::back_inserter(text), form, std::forward<Args>(args)...);
  };
  const auto& model = plan.model;
  const auto& from = plan.provenance;
  say("model       {}, {} layers, {} KV heads of {}\n", model.architecture, model.num_layers, model.num_kv_heads, model.head_dim);
  say("method      {}, {}{}\n", from.method, units_text(from.units), exact_text(plan));
  say("calibrated  {}, seed {}, {}\n", samples_text(from), from.seed, from.device);
  say("bits        {:.4g} per element at {} tokens, everything stored per token counted; {} of codebooks beside\n",
      effective_bits(plan), from.context, bytes_text(constant_bytes(plan)));
  constexpr std::int64_t kTokens = 32768;
  say("memory      {} at 32,768 tokens, {:.4g} bits per element (at 16 bits: {}); each further token {:.0f} bytes\n",
      bytes_text(static_cast<std::size_t>(cache_bytes(plan, kTokens))), effective_bits(plan, kTokens),
      bytes_text(static_cast<std::size_t>(full_bytes(plan, kTokens))), bytes_per_token(plan));
  if (!plan.sliding.empty())
    say("sliding     {} layers keep the tokens of their window at full precision: {} beside, not in the bits; {} together\n",
        plan.sliding.size(), bytes_text(static_cast<std::size_t>(sliding_bytes(model, plan.sliding, kTokens))),
        bytes_text(static_cast<std::size_t>(sliding_bytes(model, plan.sliding, kTokens) + cache_bytes(plan, kTokens))));
  if (plan.predicted_kl) say("predicted   KL {:.4f} nats a token\n", *plan.predicted_kl);
  std::vector<std::vector<std::string>> rows = {{"layer", "keys", "values"}};
  for (int layer = 0; layer < model.num_layers; ++layer) {
    const auto slides =
        std::find_if(plan.sliding.begin(), plan.sliding.end(), [layer](const auto& some) { return some.layer == layer; });
    if (slides != plan.sliding.end()) {
      rows.push_back({layer_name(layer), fmt::format("full, last {}", slides->window), "full"});
      continue;
    }
    rows.push_back({layer_name(layer), side_bits(plan, layer, Side::kKeys), side_bits(plan, layer, Side::kValues)});
  }
  say("\n{}", table(rows));
  return text + units_at_stake(plan);
}

}  // namespace veloxquant
