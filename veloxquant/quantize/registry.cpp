#include "veloxquant/quantize/registry.h"

#include <fmt/ranges.h>

#include "veloxquant/core/error.h"
#include "veloxquant/quantize/affine.h"
#include "veloxquant/quantize/kivi.h"
#include "veloxquant/quantize/rotated_pq.h"
#include "veloxquant/quantize/turboquant.h"
#include "veloxquant/quantize/vecinfer.h"

namespace veloxquant {

std::string_view to_string(Side side) {
  return side == Side::kKeys ? "keys" : "values";
}

std::span<const QuantizerMethod> quantizer_methods() {
  static const QuantizerMethod table[] = {affine_method(), kivi_method(), turboquant_method(), vecinfer_method(),
                                          rotated_pq_method()};
  return table;
}

const QuantizerMethod& quantizer_method(std::string_view name) {
  for (const auto& method : quantizer_methods())
    if (method.name == name) return method;
  throw_invalid("quantizer", "unknown method \"{}\"; there are {}", name, fmt::join(quantizer_names(), ", "));
}

std::vector<std::string> quantizer_names() {
  std::vector<std::string> names;
  for (const auto& method : quantizer_methods()) names.emplace_back(method.name);
  return names;
}

std::vector<std::string> scalar_quantizer_names() {
  std::vector<std::string> names;
  for (const auto& method : quantizer_methods())
    if (!method.learns()) names.emplace_back(method.name);
  return names;
}

void check_dim(const QuantizerMethod& method, int dim) {
  if (method.widths(dim).empty()) throw_invalid(method.name, "head_dim: expected {}, got {}", method.dims, dim);
}

std::unique_ptr<const Quantizer> make_quantizer(const QuantizerParameters& parameters) {
  return quantizer_method(parameters.method).make(parameters);
}

}  // namespace veloxquant
