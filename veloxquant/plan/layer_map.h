// Maps from layers, in numeric order.
#pragma once

#include <map>
#include <string>
#include <string_view>

namespace veloxquant {

/// "layer_0", "layer_1", …
std::string layer_name(int index);

/// The index in such a name.  Throws std::invalid_argument for any other text.
int layer_index(std::string_view name);

/// Orders names of layers by their number, so that layer_2 stands before layer_10.
struct LayerOrder {
  bool operator()(const std::string& a, const std::string& b) const { return a.size() != b.size() ? a.size() < b.size() : a < b; }
};

template <class T>
using LayerMap = std::map<std::string, T, LayerOrder>;

}  // namespace veloxquant
