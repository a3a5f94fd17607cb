#include "veloxquant/plan/sensitivity.h"

#include "veloxquant/core/error.h"
#include "veloxquant/core/json.h"
#include "veloxquant/quantize/registry.h"

namespace veloxquant {
namespace {

// Far beyond anything measured, and small enough for products of such numbers to stay finite.
constexpr double kLargest = 1e60;

std::vector<DistortionPoint> read_points(const nlohmann::json& list, const std::string& where) {
  if (!list.is_array()) throw_failure("json", "{}: expected a list of points", where);
  std::vector<DistortionPoint> points;
  for (const auto& item : list) {
    const JsonObject point(item, fmt::format("{}[{}]", where, points.size()));
    point.expect_only({"rate", "keys", "values"});
    const double last = points.empty() ? 0.0 : points.back().rate;
    points.push_back({point.number("rate", 1e-6, 64), point.number("keys", 0, kLargest), point.number("values", 0, kLargest)});
    if (points.back().rate <= last) point.refuse("rate", fmt::format("more than the rate before, {}", last));
  }
  return points;
}

void check_quantizer(const std::string& name, const std::string& where) try {
  quantizer_method(name);
} catch (const std::invalid_argument& error) {
  throw_failure("json", "{}: {}", where, error.what());
}

SensitivityResult read_result(const JsonObject& json) {
  json.expect_only({"layer_name", "mean_sensitivity", "std_sensitivity", "distortions"});
  SensitivityResult result{.layer_name = json.string("layer_name"),
                           .mean_sensitivity = json.number("mean_sensitivity", 0, kLargest),
                           .std_sensitivity = json.number("std_sensitivity", 0, kLargest),
                           .distortions = {}};
  if (!json.has("distortions")) return result;
  const JsonObject distortions = json.object("distortions");
  for (const auto& [quantizer, points] : json.at("distortions").items()) {
    check_quantizer(quantizer, distortions.where());
    result.distortions[quantizer] = read_points(points, distortions.where() + ": " + quantizer);
  }
  return result;
}

}  // namespace

nlohmann::ordered_json to_json(const LayerMap<SensitivityResult>& results) {
  auto json = nlohmann::ordered_json::object();
  for (const auto& [name, result] : results) {
    auto distortions = nlohmann::ordered_json::object();
    for (const auto& [quantizer, points] : result.distortions) {
      auto list = nlohmann::ordered_json::array();
      for (const auto& point : points) list.push_back({{"rate", point.rate}, {"keys", point.keys}, {"values", point.values}});
      distortions[quantizer] = std::move(list);
    }
    json[name] = {{"layer_name", result.layer_name},
                  {"mean_sensitivity", result.mean_sensitivity},
                  {"std_sensitivity", result.std_sensitivity},
                  {"distortions", std::move(distortions)}};
  }
  return json;
}

LayerMap<SensitivityResult> sensitivities_from_json(const nlohmann::json& json, const std::string& source) {
  const JsonObject object(json, source);
  const std::size_t layers = json.size() - (object.has("units") ? 1 : 0);
  if (layers == 0) throw_failure("json", "{}: expected at least layer_0, got no layers", source);
  LayerMap<SensitivityResult> results;
  for (std::size_t i = 0; i < layers; ++i) {
    const std::string name = layer_name(static_cast<int>(i));
    if (!object.has(name)) throw_failure("json", "{}: {} fields, but none is {}", source, layers, name);
    auto result = read_result(object.object(name));
    if (result.layer_name != name) object.object(name).refuse("layer_name", name);
    results.emplace(name, std::move(result));
  }
  return results;
}

}  // namespace veloxquant
