// What the sensitivity probe says of a layer.
#pragma once

#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "veloxquant/plan/layer_map.h"

namespace veloxquant {

/// Relative distortion of a quantizer on a layer's keys and on its values, at a rate in bits of codes an element.
struct DistortionPoint {
  double rate, keys, values;

  bool operator==(const DistortionPoint&) const = default;
};

struct SensitivityResult {
  std::string layer_name;
  double mean_sensitivity = 0;  // output change, √(2·KL), per unit of relative noise: mean over samples
  double std_sensitivity = 0;   // standard deviation over samples

  /// By quantizer, ascending in rate.  May be empty: a caller may build a result from the three documented fields.
  std::map<std::string, std::vector<DistortionPoint>> distortions;

  bool operator==(const SensitivityResult&) const = default;
};

/// {"layer_0": {"layer_name", "mean_sensitivity", "std_sensitivity", "distortions": {quantizer: [{"rate", "keys", "values"}]}}, …}.
nlohmann::ordered_json to_json(const LayerMap<SensitivityResult>& results);

/// Reads that back; a field "units", which the adjoint probe adds, is passed over.  Throws std::runtime_error that names `source`,
/// layer and field: for layers that are missing or misnamed, numbers that are negative or not finite, quantizers that do not exist,
/// rates that do not ascend.
LayerMap<SensitivityResult> sensitivities_from_json(const nlohmann::json& json, const std::string& source);

}  // namespace veloxquant
