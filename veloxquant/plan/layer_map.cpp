#include "veloxquant/plan/layer_map.h"

#include <fmt/format.h>

#include <charconv>

#include "veloxquant/core/error.h"

namespace veloxquant {

std::string layer_name(int index) {
  return fmt::format("layer_{}", index);
}

int layer_index(std::string_view name) {
  constexpr std::string_view kPrefix = "layer_";
  int index = -1;
  const std::string_view digits = name.starts_with(kPrefix) ? name.substr(kPrefix.size()) : std::string_view();
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), index);
  if (error != std::errc() || index < 0 || end != digits.data() + digits.size() || layer_name(index) != name)
    throw_invalid("layer", "expected a name such as layer_0, got \"{}\"", name);
  return index;
}

}  // namespace veloxquant
