// PackedCache as arrays, and back.
#include <fmt/ranges.h>

#include <algorithm>

#include "veloxquant/cache/packed_cache.h"
#include "veloxquant/core/error.h"
#include "veloxquant/model/array_entry.h"

namespace veloxquant {

// The arrays of a state for these sequences, of zeros.
CacheState PackedCache::blank_state(std::span<const Sequence> sequences) const {
  CacheState state = empty_state(static_cast<int>(sequences.size()));
  if (sequences.empty() || sequences[0].heads.empty()) return state;
  const auto size = [](std::size_t n) { return static_cast<int>(n); };
  std::size_t blocks = 0, bytes = 0;
  for (const auto& sequence : sequences) blocks = std::max(blocks, blocks_of(sequence.coded));
  for (const auto& [keys, values] : sequences[0].heads) bytes += keys.shape.bytes + values.shape.bytes;
  const int batch = size(sequences.size()), heads = size(sequences[0].heads.size()),
            exact_bytes = size(layer_->exact(Side::kKeys).encoded_bytes(1));
  const auto add = [&](const char* name, const mx::Shape& shape, mx::Dtype type) {
    state.emplace(name, array_of_zeros(shape, type));
  };
  add("coded", {batch}, mx::int32);
  add("blocks", {batch, size(blocks), size(bytes)}, mx::uint8);
  add("patch_errors", {batch, heads, 2, size(layer_->most_patches())}, mx::float32);
  add("sinks", {batch, heads, 2, size(layer_->sinks()), exact_bytes}, mx::uint8);
  add("window", {batch, heads, 2, size(layer_->window()), exact_bytes}, mx::uint8);
  return state;
}

namespace {

// Row `row` of an array of `rows` equal ones.
std::span<std::uint8_t> row_of(const mx::array& array, std::size_t row, std::size_t rows) {
  const std::size_t bytes = array.nbytes() / rows;
  return {const_cast<std::uint8_t*>(array.data<std::uint8_t>()) + row * bytes, bytes};
}

template <class Values>
auto bytes_of(Values& values) {
  using Byte = std::conditional_t<std::is_const_v<Values>, const std::uint8_t, std::uint8_t>;
  return std::span<Byte>(reinterpret_cast<Byte*>(values.data()), values.size() * sizeof(values[0]));
}

// part(bytes that a side holds, where they are in the state), for every part of every side.
template <class Sequences, class Part>
void each_part(Sequences& sequences, const CacheState& state, const Part& part) {
  const std::size_t batch = sequences.size(), rows = 2 * batch * sequences[0].heads.size();
  const auto stride = static_cast<std::size_t>(state.at("blocks").shape(2));
  for (std::size_t b = 0, row = 0; b < batch; ++b) {
    const auto blocks = row_of(state.at("blocks"), b, batch);
    std::size_t at = 0;
    for (auto& head : sequences[b].heads)
      for (auto* side : {&head.keys, &head.values}) {
        part(bytes_of(side->open.patch_errors), row_of(state.at("patch_errors"), row, rows));
        part(bytes_of(side->exact.sinks()), row_of(state.at("sinks"), row, rows));
        part(bytes_of(side->exact.ring()), row_of(state.at("window"), row, rows));
        for (std::size_t block = 0; block < side->blocks.size(); ++block)
          part(bytes_of(side->blocks[block]), blocks.subspan(block * stride + at, side->shape.bytes));
        at += side->shape.bytes;
        ++row;
      }
  }
}

const mx::array& part_of(const CacheState& state, const std::string& name) {
  const auto found = state.find(name);
  if (found == state.end()) throw_invalid("packed cache", "expected a state with {}", name);
  return found->second;
}

std::size_t whole_number(const mx::array& array, std::size_t i, std::string_view name, std::size_t least, std::size_t most) {
  const std::int64_t value = array.data<std::int32_t>()[i];
  if (value < static_cast<std::int64_t>(least) || value > static_cast<std::int64_t>(most))
    throw_invalid("packed cache", "{}: expected {} to {}, got {}", name, least, most, value);
  return static_cast<std::size_t>(value);
}

}  // namespace

CacheState PackedCache::state() const {
  const InUse in_use(busy_);
  auto state = blank_state(sequences_);
  state.at("offset").data<std::int32_t>()[0] = offset();
  for (std::size_t b = 0; b < sequences_.size(); ++b) {
    state.at("tokens").data<std::int32_t>()[b] = static_cast<std::int32_t>(sequences_[b].tokens);
    if (state.contains("coded")) state.at("coded").data<std::int32_t>()[b] = static_cast<std::int32_t>(sequences_[b].coded);
  }
  if (state.contains("coded"))
    each_part(sequences_, state,
              [](std::span<const std::uint8_t> held, std::span<std::uint8_t> to) { std::ranges::copy(held, to.begin()); });
  return state;
}

void PackedCache::restore(const CacheState& state) {
  const InUse in_use(busy_);
  const auto &offsets = part_of(state, "offset"), &tokens = part_of(state, "tokens");
  if (offsets.dtype() != mx::int32 || offsets.size() != 1 || tokens.dtype() != mx::int32 || tokens.ndim() != 1)
    throw_invalid("packed cache", "expected one offset and a list of tokens, both int32");
  const std::size_t offset = whole_number(offsets, 0, "offset", 0, kMaxContext);
  std::vector<Sequence> sequences(tokens.size());
  for (std::size_t b = 0; b < sequences.size(); ++b) sequences[b].tokens = whole_number(tokens, b, "tokens", 0, offset);
  if (state.size() > 2) {
    const auto &coded = part_of(state, "coded"), &sinks = part_of(state, "sinks");
    if (sequences.empty() || coded.shape() != tokens.shape() || coded.dtype() != mx::int32 || sinks.ndim() != 5)
      throw_invalid("packed cache", "expected as many coded as tokens, and sinks in five dimensions");
    const auto heads = static_cast<std::size_t>(sinks.shape(1));
    for (std::size_t b = 0; b < sequences.size(); ++b) {
      auto& sequence = sequences[b];
      // All but those in the sinks, and of these all but those that the window may hold.
      const std::size_t most = sequence.tokens - std::min(sequence.tokens, layer_->sinks());
      sequence.coded = whole_number(coded, b, "coded", most - std::min(most, layer_->window()), most);
      for (std::size_t head = 0; head < heads; ++head) sequence.heads.push_back(layer_->head(head, heads));
    }
    const auto blank = blank_state(sequences);
    for (const auto& [name, array] : state) {
      const auto expected = blank.find(name);
      if (expected == blank.end()) throw_invalid("packed cache", "expected a state without {}", name);
      if (array.shape() != expected->second.shape() || array.dtype() != expected->second.dtype())
        throw_invalid("packed cache", "{}: expected {} bytes of shape [{}], got {} of [{}]", name, expected->second.nbytes(),
                      fmt::join(expected->second.shape(), ", "), array.nbytes(), fmt::join(array.shape(), ", "));
    }
    for (const auto& [name, array] : blank) part_of(state, name);
    for (auto& sequence : sequences)
      for (auto& head : sequence.heads)
        for (auto* side : {&head.keys, &head.values}) side->make_room(sequence.coded);
    each_part(sequences, state, [](std::span<std::uint8_t> held, std::span<const std::uint8_t> from) {
      std::ranges::copy(from.first(held.size()), held.begin());
    });
  } else if (std::ranges::any_of(sequences, [](const Sequence& sequence) { return sequence.tokens > 0; })) {
    throw_invalid("packed cache", "expected a state of the tokens that it counts");
  }
  sequences_ = std::move(sequences);
  offset_ = offset;
}

}  // namespace veloxquant
