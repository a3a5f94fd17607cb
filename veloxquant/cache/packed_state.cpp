#include "veloxquant/cache/packed_state.h"

#include <fmt/ranges.h>

#include <algorithm>

#include "veloxquant/core/error.h"
#include "veloxquant/core/hash.h"
#include "veloxquant/model/array_entry.h"
#include "veloxquant/quantize/packed_layout.h"

namespace veloxquant {
namespace {

// A sequence of a state.
struct Place {
  const CacheState* state;
  int sequence;
};

int integer_at(const Place& place, const char* name) {
  const auto found = place.state->find(name);
  return found == place.state->end() ? 0 : found->second.data<int>()[place.sequence];
}

int largest(const std::vector<Place>& places, const char* name) {
  int most = 0;
  for (const auto& place : places) most = std::max(most, integer_at(place, name));
  return most;
}

// Sequences lie one after another in every array, and blocks in each: of a row that is longer the begin is copied, one that is
// shorter is followed by zeros.
mx::array rows_of(const std::vector<Place>& places, const std::string& name, const mx::Shape& shape, mx::Dtype type) {
  const auto rows = array_of_zeros(shape, type);
  const std::size_t bytes = places.empty() ? 0 : rows.nbytes() / places.size();
  auto* to = const_cast<std::byte*>(rows.data<std::byte>());
  for (const auto& [state, sequence] : places) {
    if (const auto found = state->find(name); found != state->end()) {
      const auto& from = found->second;
      auto expected = shape;
      expected[0] = from.shape(0);
      if (name == "blocks" && from.ndim() == 3) expected[1] = from.shape(1);
      if (from.shape() != expected || from.dtype() != type)
        throw_invalid("packed cache", "{}: expected sequences of [{}], got [{}]", name, fmt::join(expected, ", "),
                      fmt::join(from.shape(), ", "));
      const std::size_t row = from.nbytes() / static_cast<std::size_t>(from.shape(0));
      std::copy_n(from.data<std::byte>() + static_cast<std::size_t>(sequence) * row, std::min(row, bytes), to);
    }
    to += bytes;
  }
  return rows;
}

CacheState gather(const std::vector<Place>& places, const CacheState& like) {
  constexpr int kTokens = static_cast<int>(kPackedBlockTokens);
  CacheState gathered{{"offset", mx::array(largest(places, "tokens"))}};
  for (const auto& [name, model] : like) {
    if (name == "offset") continue;
    auto shape = model.shape();
    shape[0] = static_cast<int>(places.size());
    if (name == "blocks") shape[1] = (largest(places, "coded") + kTokens - 1) / kTokens;
    gathered.emplace(name, rows_of(places, name, shape, model.dtype()));
  }
  return gathered;
}

}  // namespace

CacheState empty_state(int sequences) {
  return {{"offset", mx::array(0)}, {"tokens", array_of_zeros({sequences}, mx::int32)}};
}

CacheState select_sequences(const CacheState& state, const std::vector<int>& sequences) {
  const int batch = state.at("tokens").shape(0);
  std::vector<Place> places;
  for (const int sequence : sequences) {
    if (sequence < 0 || sequence >= batch) throw_invalid("packed cache", "sequence: expected 0 to {}, got {}", batch - 1, sequence);
    places.push_back({&state, sequence});
  }
  return gather(places, state);
}

CacheState join_sequences(std::span<const CacheState> states) {
  if (states.empty()) throw_invalid("packed cache", "expected at least one cache to join");
  std::vector<Place> places;
  for (const auto& state : states)
    for (int i = 0; i < state.at("tokens").shape(0); ++i) places.push_back({&state, i});
  // Those that no token has come to have no other arrays.
  const auto used = std::find_if(states.begin(), states.end(), [](const CacheState& state) { return state.contains("blocks"); });
  return gather(places, used == states.end() ? states.front() : *used);
}

std::string checksum(std::string_view text, const CacheState& state) {
  Sha256 hash;
  hash.add(text);
  for (const auto& [name, array] : state) {
    const auto entry = as_entry(array);
    hash.add(fmt::format("\n{} {} [{}]\n", name, entry.dtype, fmt::join(entry.shape, ", ")));
    hash.add({reinterpret_cast<const char*>(entry.data.data()), entry.data.size()});
  }
  return hash.hex();
}

}  // namespace veloxquant
