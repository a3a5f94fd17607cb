#include "veloxquant/cache/packed_layer.h"

#include <algorithm>

#include "veloxquant/plan/plan.h"

namespace veloxquant {

PackedLayer::PackedLayer(std::vector<QuantizerParameters> keys, std::vector<QuantizerParameters> values, int window, int sinks)
    : keys_(std::move(keys)),
      values_(std::move(values)),
      exact_keys_(make_quantizer(exact_parameters(Side::kKeys, keys_.at(0).dim))),
      exact_values_(make_quantizer(exact_parameters(Side::kValues, keys_.at(0).dim))),
      keys_before_rope_(quantizer_method(keys_.at(0).method).keys_before_rope),
      window_(static_cast<std::size_t>(window)),
      sinks_(static_cast<std::size_t>(sinks)) {
  for (const auto& unit : keys_) key_shapes_.push_back(block_shape(unit));
  for (const auto& unit : values_) value_shapes_.push_back(block_shape(unit));
}

std::vector<PackedHead> PackedLayer::heads(std::size_t kv_heads) const {
  std::vector<PackedHead> heads;
  std::size_t begin = 0;
  const auto side = [&](Side which, const BlockShape& shape) {
    PackedSide made{.exact = ExactStore(exact(which), window_, sinks_), .shape = shape, .begin = begin};
    begin = made.end();
    return made;
  };
  for (std::size_t head = 0; head < kv_heads; ++head) {
    auto keys = side(Side::kKeys, unit(key_shapes_, head));
    heads.push_back({std::move(keys), side(Side::kValues, unit(value_shapes_, head))});
  }
  return heads;
}

StateSizes PackedLayer::state_sizes(std::size_t kv_heads) const {
  std::size_t bytes = 0, patches = 0;
  for (const auto* shapes : {&key_shapes_, &value_shapes_})
    for (std::size_t head = 0; head < kv_heads; ++head) {
      const BlockShape& shape = unit(*shapes, head);
      bytes += shape.bytes;
      patches = std::max(patches, shape.patches);
    }
  const auto size = [](std::size_t n) { return static_cast<int>(n); };
  return {.heads = size(kv_heads),
          .block_bytes = size(bytes),
          .patches = size(patches),
          .sinks = size(sinks_),
          .window = size(window_),
          .token_bytes = size(exact_keys_->encoded_bytes(1))};
}

const PackedLayer::Codecs& PackedLayer::codecs(const Rope& rope) const {
  std::call_once(made_, [&] {
    rope_ = rope;
    Codecs made;  // none where one is refused
    for (const auto& unit : keys_) made.keys.push_back(make_block_codec(unit, keys_before_rope_ ? &*rope_ : nullptr));
    for (const auto& unit : values_) made.values.push_back(make_block_codec(unit, nullptr));
    codecs_ = std::move(made);
  });
  return codecs_;
}

}  // namespace veloxquant
