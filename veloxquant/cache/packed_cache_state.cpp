// PackedCache as arrays, and back.
#include <algorithm>

#include "veloxquant/cache/packed_cache.h"

namespace veloxquant {

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
  for (std::size_t b = 0, row = 0; b < batch; ++b) {
    auto blocks = row_of(state.at("blocks"), b, batch);
    for (auto& block : sequences[b].blocks) {
      part(bytes_of(block), blocks.first(block.size()));
      blocks = blocks.subspan(block.size());
    }
    for (auto& head : sequences[b].heads)
      for (auto* side : {&head.keys, &head.values}) {
        part(bytes_of(side->open.patch_errors), row_of(state.at("patch_errors"), row, rows));
        part(bytes_of(side->exact.sinks()), row_of(state.at("sinks"), row, rows));
        part(bytes_of(side->exact.ring()), row_of(state.at("window"), row, rows));
        ++row;
      }
  }
}

}  // namespace

CacheState PackedCache::state() const {
  const InUse in_use(busy_);
  StateCounts counts{.offset = offset(), .tokens = tokens(), .coded = {}};
  if (kv_heads_ == 0) return counting_state(counts);
  for (const auto& of_sequence : counts_) counts.coded.push_back(static_cast<int>(of_sequence.coded));
  auto state = blank_state(counts, layer_->state_sizes(kv_heads_));
  each_part(sequences(), state,
            [](std::span<const std::uint8_t> held, std::span<std::uint8_t> to) { std::ranges::copy(held, to.begin()); });
  return state;
}

void PackedCache::restore(const CacheState& state) {
  const InUse in_use(busy_);
  StateSizes sizes{};
  const auto counts = check_state(state, [&](int heads) {
    check_units(heads, layer_->units(Side::kKeys), layer_->units(Side::kValues));
    return sizes = layer_->state_sizes(static_cast<std::size_t>(heads));
  });
  std::vector<PackedSequence> sequences(counts.tokens.size());
  for (std::size_t b = 0; b < sequences.size(); ++b) {
    sequences[b].tokens = static_cast<std::size_t>(counts.tokens[b]);
    if (!counts.coded.empty()) sequences[b].coded = static_cast<std::size_t>(counts.coded[b]);
    if (sizes.heads == 0) continue;
    sequences[b].heads = layer_->heads(static_cast<std::size_t>(sizes.heads));
    sequences[b].make_room(sequences[b].coded);
    for (auto& [keys, values] : sequences[b].heads)
      for (auto* side : {&keys, &values})
        side->open.patch_errors.assign(std::min(side->shape.patches, tokens_in_last_block(sequences[b].coded)), 0.0f);
  }
  if (sizes.heads > 0)
    each_part(sequences, state, [](std::span<std::uint8_t> held, std::span<const std::uint8_t> from) {
      std::ranges::copy(from.first(held.size()), held.begin());
    });
  counts_.clear();
  for (const auto& sequence : sequences) counts_.push_back({sequence.tokens, sequence.coded});
  // Calls that were not evaluated belong to what was held before.
  sequences_ = std::make_shared<std::vector<PackedSequence>>(std::move(sequences));
  last_call_.reset();
  kv_heads_ = static_cast<std::size_t>(sizes.heads);
  offset_ = static_cast<std::size_t>(counts.offset);
}

}  // namespace veloxquant
