#include "veloxquant/plan/layer_map.h"

#include <gtest/gtest.h>

#include <stdexcept>

namespace veloxquant {
namespace {

TEST(LayerMap, NumericOrder) {
  LayerMap<int> map;
  for (int i = 200; i-- > 0;) map[layer_name(i)] = i;
  int expected = 0;
  for (const auto& [name, value] : map) {
    EXPECT_EQ(value, expected++);
    EXPECT_EQ(layer_index(name), value);
  }
  EXPECT_EQ(expected, 200);
}

TEST(LayerMap, RefusesOtherNames) {
  for (const char* name : {"", "layer_", "layer", "layer_-1", "layer_+1", "layer_01", "layer_1 ", " layer_1", "layer_1x", "Layer_1",
                           "layer_1.0", "layer_2147483648", "layer_99999999999999999999", "layers_1", "1"})
    EXPECT_THROW(layer_index(name), std::invalid_argument) << name;
  EXPECT_EQ(layer_index("layer_0"), 0);
  EXPECT_EQ(layer_index("layer_2147483647"), 2147483647);
}

}  // namespace
}  // namespace veloxquant
