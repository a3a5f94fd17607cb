#include "veloxquant/plan/sensitivity.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/temporary_folder.h"
#include "veloxquant/core/json.h"

namespace veloxquant {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using testing::message_of;

LayerMap<SensitivityResult> some_results() {
  LayerMap<SensitivityResult> results;
  for (int i = 0; i < 12; ++i) {
    auto& result = results[layer_name(i)];
    result = {.layer_name = layer_name(i), .mean_sensitivity = 0.1 / (i + 3), .std_sensitivity = 1e-7 * i, .distortions = {}};
    if (i != 5)
      result.distortions = {{"turboquant", {{1, 0.36, 0.37}, {1.5, 0.2, 0.3}}}, {"kivi", {{2, 0.1, 1e-17}}}, {"affine", {}}};
  }
  return results;
}

LayerMap<SensitivityResult> read(const std::string& text) {
  return sensitivities_from_json(parse_json(text, "probe.json"), "probe.json");
}

TEST(Sensitivity, RoundTripIsExact) {
  const auto results = some_results();
  const std::string text = to_json(results).dump(2);
  EXPECT_EQ(read(text), results);
  EXPECT_LT(text.find("layer_2\""), text.find("layer_10\""));
}

TEST(Sensitivity, DistortionsMayBeAbsent) {
  const auto results = read(R"({"layer_0": {"layer_name": "layer_0", "mean_sensitivity": 0.5, "std_sensitivity": 0}})");
  EXPECT_EQ(results.at("layer_0").mean_sensitivity, 0.5);
  EXPECT_TRUE(results.at("layer_0").distortions.empty());
}

std::string one_layer(const std::string& fields) {
  return R"({"layer_0": {"layer_name": "layer_0", )" + fields + "}}";
}

TEST(Sensitivity, RefusesAndNamesTheField) {
  const std::string good = R"("mean_sensitivity": 1, "std_sensitivity": 1)";
  const auto point = [&](const std::string& points) { return one_layer(good + R"(, "distortions": {"kivi": )" + points + "}"); };
  const struct {
    std::string text;
    const char* named;
  } cases[] = {
      {"[]", "object"},
      {"{}", "layer_0"},
      {R"({"layer_1": {}})", "layer_0"},
      {R"({"layer_0": {}, "more": 1})", "layer_0"},
      {R"({"layer_0": 1})", "layer_0"},
      {R"({"layer_0": {"layer_name": "layer_1", "mean_sensitivity": 1, "std_sensitivity": 1}})", "layer_name"},
      {one_layer(R"("mean_sensitivity": 1)"), "std_sensitivity"},
      {one_layer(R"("std_sensitivity": 1)"), "mean_sensitivity"},
      {one_layer(R"("mean_sensitivity": -1, "std_sensitivity": 1)"), "mean_sensitivity"},
      {one_layer(R"("mean_sensitivity": 1, "std_sensitivity": -0.5)"), "std_sensitivity"},
      {one_layer(R"("mean_sensitivity": null, "std_sensitivity": 1)"), "mean_sensitivity"},
      {one_layer(R"("mean_sensitivity": 1e200, "std_sensitivity": 1)"), "mean_sensitivity"},
      {one_layer(R"("mean_sensitivity": "1", "std_sensitivity": 1)"), "mean_sensitivity"},
      {one_layer(good + R"(, "more": 1)"), "more"},
      {one_layer(good + R"(, "distortions": [])"), "distortions"},
      {one_layer(good + R"(, "distortions": {"gguf": []})"), "gguf"},
      {point("1"), "kivi"},
      {point(R"([{"rate": 1, "keys": 1}])"), "values"},
      {point(R"([{"rate": 1, "keys": -1, "values": 1}])"), "keys"},
      {point(R"([{"rate": 0, "keys": 1, "values": 1}])"), "rate"},
      {point(R"([{"rate": 2, "keys": 1, "values": 1}, {"rate": 2, "keys": 1, "values": 1}])"), "rate"},
      {point(R"([{"rate": 2, "keys": 1, "values": 1, "more": 1}])"), "more"},
  };
  for (const auto& c : cases)
    EXPECT_THAT(message_of<std::runtime_error>([&] { read(c.text); }), AllOf(HasSubstr("probe.json"), HasSubstr(c.named)))
        << c.text;
}

TEST(Sensitivity, RefusesGaps) {
  auto json = to_json(some_results());
  json.erase("layer_4");
  EXPECT_THAT(message_of<std::runtime_error>([&] { read(json.dump()); }), HasSubstr("layer_4"));
}

}  // namespace
}  // namespace veloxquant
