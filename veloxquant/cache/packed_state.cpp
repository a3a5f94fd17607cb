#include "veloxquant/cache/packed_state.h"

#include <fmt/ranges.h>

#include <algorithm>

#include "mlx/ops.h"
#include "veloxquant/core/error.h"
#include "veloxquant/core/hash.h"
#include "veloxquant/model/array_entry.h"
#include "veloxquant/plan/plan.h"
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
  CacheState gathered{{"offset", mx::array(largest(places, "tokens"))}};
  for (const auto& [name, model] : like) {
    if (name == "offset") continue;
    auto shape = model.shape();
    shape[0] = static_cast<int>(places.size());
    if (name == "blocks") shape[1] = blocks_of(largest(places, "coded"));
    gathered.emplace(name, rows_of(places, name, shape, model.dtype()));
  }
  return gathered;
}

const mx::array& part_of(const CacheState& state, const char* name) {
  const auto found = state.find(name);
  if (found == state.end()) throw_invalid("packed cache", "expected a state with {}", name);
  return found->second;
}

int whole_number(const mx::array& array, std::size_t i, const char* name, int least, int most) {
  const int value = array.data<int>()[i];
  if (value < least || value > most) throw_invalid("packed cache", "{}: expected {} to {}, got {}", name, least, most, value);
  return value;
}

}  // namespace

mx::array int_array(std::span<const int> values) {
  const auto array = array_of_zeros({static_cast<int>(values.size())}, mx::int32);
  std::ranges::copy(values, const_cast<int*>(array.data<int>()));
  return array;
}

void check_units(int kv_heads, std::size_t key_units, std::size_t value_units) {
  if (kv_heads < 1) throw_invalid("packed cache", "expected keys of one KV head or more, got {}", kv_heads);
  for (const std::size_t units : {key_units, value_units})
    if (units != 1 && units != static_cast<std::size_t>(kv_heads))
      throw_invalid("packed cache", "expected keys of {} KV heads, got {}", units, kv_heads);
}

void check_units(const mx::array& k, std::size_t key_units, std::size_t value_units, int dim) {
  check_units(k.shape(1), key_units, value_units);
  if (k.shape(3) != dim) throw_invalid("packed cache", "expected keys of {} dimensions, got {}", dim, k.shape(3));
}

void check_chunk(const mx::array& q, const mx::array& k, const mx::array& v, const mx::Shape& expected) {
  if (k.shape() != expected || v.shape() != expected)
    throw_invalid("packed cache", "expected keys and values of shape [{}], got [{}] and [{}]", fmt::join(expected, ", "),
                  fmt::join(k.shape(), ", "), fmt::join(v.shape(), ", "));
  if (k.size() == 0)
    throw_invalid("packed cache", "expected keys of one sequence, one KV head and one token or more, got [{}]",
                  fmt::join(k.shape(), ", "));
  auto queries = expected;
  queries[1] = std::max(1, q.shape(1) / k.shape(1)) * k.shape(1);
  if (q.shape() != queries)
    throw_invalid("packed cache", "expected queries of shape [{}], got [{}]", fmt::join(queries, ", "), fmt::join(q.shape(), ", "));
}

std::vector<int> own_tokens(const std::vector<int>& tokens, int offset, int came, const AttentionSpec& spec) {
  std::vector<int> own(tokens.size(), came);
  if (!spec.padding) return own;
  const auto padding = on_cpu(mx::astype(*spec.padding, mx::int32));
  if (padding.shape() != mx::Shape{static_cast<int>(tokens.size())})
    throw_invalid("packed cache", "padding: expected [{}], got [{}]", tokens.size(), fmt::join(padding.shape(), ", "));
  for (std::size_t b = 0; b < own.size(); ++b) {
    const std::int64_t skipped = padding.data<int>()[b], after = std::max<std::int64_t>(0, std::int64_t{offset} + came - skipped),
                       held = tokens[b];
    if (after < held || after > held + came)
      throw_invalid("packed cache", "padding of sequence {}: expected one that leaves it {} to {} tokens, got {}, which leaves {}",
                    b, held, held + came, skipped, after);
    own[b] = static_cast<int>(after - held);
  }
  return own;
}

CacheState counting_state(const StateCounts& counts) {
  CacheState state{{"offset", mx::array(counts.offset)}, {"tokens", int_array(counts.tokens)}};
  if (!counts.coded.empty()) state.emplace("coded", int_array(counts.coded));
  return state;
}

CacheState blank_state(const StateCounts& counts, const StateSizes& sizes) {
  auto state = counting_state(counts);
  const int batch = static_cast<int>(counts.tokens.size()), most = *std::ranges::max_element(counts.coded);
  const auto add = [&](const char* name, const mx::Shape& shape, mx::Dtype type) {
    state.emplace(name, array_of_zeros(shape, type));
  };
  add("blocks", {batch, blocks_of(most), sizes.block_bytes}, mx::uint8);
  add("patch_errors", {batch, sizes.heads, 2, sizes.patches}, mx::float32);
  add("sinks", {batch, sizes.heads, 2, sizes.sinks, sizes.token_bytes}, mx::uint8);
  add("window", {batch, sizes.heads, 2, sizes.window, sizes.token_bytes}, mx::uint8);
  return state;
}

StateCounts check_state(const CacheState& state, const std::function<StateSizes(int heads)>& sizes) {
  const auto &offset = part_of(state, "offset"), &tokens = part_of(state, "tokens");
  if (offset.dtype() != mx::int32 || offset.size() != 1 || tokens.dtype() != mx::int32 || tokens.ndim() != 1)
    throw_invalid("packed cache", "expected one offset and a list of tokens, both int32");
  StateCounts counts{.offset = whole_number(offset, 0, "offset", 0, static_cast<int>(kMaxContext)), .tokens = {}, .coded = {}};
  for (std::size_t b = 0; b < tokens.size(); ++b) counts.tokens.push_back(whole_number(tokens, b, "tokens", 0, counts.offset));
  if (state.size() == 2) {
    if (std::ranges::any_of(counts.tokens, [](int tokens) { return tokens > 0; }))
      throw_invalid("packed cache", "expected a state of the tokens that it counts");
    return counts;
  }
  const auto &coded = part_of(state, "coded"), &sinks = part_of(state, "sinks");
  if (tokens.size() == 0 || coded.shape() != tokens.shape() || coded.dtype() != mx::int32 || sinks.ndim() != 5)
    throw_invalid("packed cache", "expected as many coded as tokens, and sinks in five dimensions");
  const StateSizes expected_sizes = sizes(sinks.shape(1));
  for (std::size_t b = 0; b < tokens.size(); ++b) {
    // All but those in the sinks, and of these all but those that the window may hold.
    const int most = counts.tokens[b] - std::min(counts.tokens[b], expected_sizes.sinks);
    counts.coded.push_back(whole_number(coded, b, "coded", most - std::min(most, expected_sizes.window), most));
  }
  const auto blank = blank_state(counts, expected_sizes);
  for (const auto& [name, array] : state) {
    const auto expected = blank.find(name);
    if (expected == blank.end()) throw_invalid("packed cache", "expected a state without {}", name);
    if (name != "offset" && (array.shape() != expected->second.shape() || array.dtype() != expected->second.dtype()))
      throw_invalid("packed cache", "{}: expected {} bytes of shape [{}], got {} of [{}]", name, expected->second.nbytes(),
                    fmt::join(expected->second.shape(), ", "), array.nbytes(), fmt::join(array.shape(), ", "));
  }
  for (const auto& [name, array] : blank) part_of(state, name.c_str());
  return counts;
}

CacheState empty_state(int sequences) {
  return counting_state({.offset = 0, .tokens = std::vector<int>(static_cast<std::size_t>(sequences)), .coded = {}});
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
