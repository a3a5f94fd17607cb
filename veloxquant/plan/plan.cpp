#include "veloxquant/plan/plan.h"

#include "veloxquant/core/error.h"

namespace veloxquant {

double effective_bits(const Plan& plan) {
  double sum = 0;
  for (const auto& unit : plan.units) sum += make_quantizer(unit.quantizer)->rate();
  return plan.units.empty() ? 0.0 : sum / static_cast<double>(plan.units.size());
}

std::size_t constant_bytes(const Plan& plan) {
  std::size_t bytes = 0;
  for (const auto& unit : plan.units)
    for (const auto& [name, tensor] : unit.quantizer.tensors) bytes += tensor.values.size() * sizeof(float);
  return bytes;
}

double bytes_per_token(const Plan& plan) {
  const double elements = 2.0 * plan.model.num_layers * plan.model.num_kv_heads * plan.model.head_dim;
  return effective_bits(plan) * elements / 8;
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
  compare("config_hash", plan.model.config_hash, model.config_hash);
  compare("weights_hash", plan.model.weights_hash, model.weights_hash);
}

void check_plan(const Plan& plan) {
  const auto expected = static_cast<std::size_t>(plan.model.num_layers) * 2;
  if (plan.units.size() != expected)
    throw_invalid("plan", "units: expected {} for {} layers, got {}", expected, plan.model.num_layers, plan.units.size());
  for (std::size_t i = 0; i < plan.units.size(); ++i) {
    const UnitPlan& unit = plan.units[i];
    const int layer = static_cast<int>(i / 2);
    const Side side = i % 2 == 0 ? Side::kKeys : Side::kValues;
    if (unit.layer != layer || unit.side != side || unit.quantizer.side != side)
      throw_invalid("plan", "units[{}]: expected {} of layer {}, got {} of layer {}", i, to_string(side), layer,
                    to_string(unit.side), unit.layer);
    if (unit.quantizer.dim != plan.model.head_dim)
      throw_invalid("plan", "units[{}]: dim: expected the head_dim {}, got {}", i, plan.model.head_dim, unit.quantizer.dim);
    try {
      make_quantizer(unit.quantizer);
    } catch (const std::invalid_argument& error) {
      throw_invalid("plan", "units[{}]: {}", i, error.what());
    }
  }
}

}  // namespace veloxquant
