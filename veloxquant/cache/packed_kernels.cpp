#include "veloxquant/cache/packed_kernels.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <numbers>

#include "mlx/ops.h"
#include "veloxquant/cache/layer_tables.h"
#include "veloxquant/kernels/cuda/packed_units.h"
#include "veloxquant/quantize/packed_layout.h"
#include "veloxquant/quantize/rotated_pq.h"

namespace veloxquant {
namespace {

// What the kernels read is what the CPU writes.
static_assert(kTileTokens == kPackedTileTokens && kTileTokens * kTilesOfBlock == kPackedBlockTokens);
static_assert(kBeam == RotatedPqQuantizer::kBeam && kPatchCentre == RotatedPqQuantizer::kPatchCentre);

constexpr float kLog2E = std::numbers::log2e_v<float>;
constexpr int kBlock = static_cast<int>(kPackedBlockTokens), kFloat = sizeof(float);

// Of each of which a processor runs two at once at least.
constexpr int kBlocksOfProcessor = 2;

// Parts that finishing reads as fast as one, and tiles that are looked up in the time that another part takes there.
constexpr int kFewParts = 32, kTilesOfPart = 4;

constexpr int kScoresAtOnce = 1 << 27;  // of many tokens: half a gigabyte of them, and as much of weights

int tiles_of(int tokens) {
  return (tokens + kTileTokens - 1) / kTileTokens;
}

int row_groups(int rows) {
  return (rows + kQueriesAtOnce - 1) / kQueriesAtOnce;
}

// Sub-spaces of up to 32 dimensions are most; wider ones get kernels with more shared memory.
int width_class(int most_width) {
  return most_width <= 32 ? 32 : kMostSubspace;
}

}  // namespace

std::variant<std::unique_ptr<const PackedKernels>, std::string> PackedKernels::make(const LayerUnits& keys, const LayerUnits& values,
                                                                                    int kv_heads, int window, int sinks,
                                                                                    const Rope& rope) {
  const auto tables = layer_tables(keys, values, kv_heads, window, sinks, rope);
  if (const auto* why = std::get_if<std::string>(&tables)) return *why;
  const auto& words = std::get<LayerWords>(tables);
  const int width = width_class(words.most_width), dim = keys.parameters(0).dim,
            needed = kFloat * std::max({attention_floats(dim), encode_token_floats(dim, width), encode_tile_floats(dim, width)});
  if (needed > most_shared_bytes())
    return fmt::format("kernels need {} bytes of shared memory, this GPU has {}", needed, most_shared_bytes());
  const auto& layer = *reinterpret_cast<const LayerTables*>(words.words.data());
  std::unique_ptr<PackedKernels> made(new PackedKernels());
  auto& self = *made;
  self.kv_heads_ = kv_heads, self.dim_ = dim, self.window_ = window, self.sinks_ = sinks;
  self.block_bytes_ = 4 * layer.block_words, self.num_errors_ = layer.num_errors, self.most_width_ = width;
  self.tables_ = mx::array(words.words.data(), {static_cast<int>(words.words.size())}, mx::int32);
  const auto of_dim = std::to_string(self.dim_), of_width = fmt::format("{}_{}", self.dim_, self.most_width_);
  self.round_.emplace("ROUND", of_dim);
  self.encode_.emplace("ENCODE", of_width);
  self.patch_.emplace("PATCH", of_dim);
  self.append_.emplace("APPEND", of_width);
  self.restore_.emplace("RESTORE", of_dim);
  self.softmax_.emplace("SOFTMAX", of_dim);
  self.attend_.emplace("ATTEND", of_dim);
  self.finish_.emplace("FINISH", of_dim);
  self.fast_ = FastAttention::make(keys, values, kv_heads, window, sinks, rope);
  return std::unique_ptr<const PackedKernels>(std::move(made));
}

PackedKernels::State PackedKernels::append(const State& state, const mx::array& k, const mx::array& v, const Counts& before,
                                           const Counts& after) const {
  const auto& exact = state.exact ? *state.exact : state.open;
  const auto& errors = state.errors ? *state.errors : k;
  const auto shape_of = [](const std::optional<mx::array>& x) { return x ? x->shape() : mx::Shape{1}; };
  const auto out = (*append_)({*tables_, k, v, exact, state.open, errors},
                              {shape_of(state.exact), state.open.shape(), shape_of(state.errors)}, {mx::uint8, mx::uint8, mx::float32},
                              {before.coded, before.offset, after.coded, after.offset, most_width_}, {2, k.shape(0) * kv_heads_, 1},
                              kEncodingThreads, kFloat * encode_token_floats(dim_, most_width_));
  State next{std::nullopt, out[1], std::nullopt};
  if (state.exact) next.exact = out[0];
  if (state.errors) next.errors = out[2];
  return next;
}

PackedKernels::Rounded PackedKernels::round(const std::optional<mx::array>& exact, const mx::array& k, const mx::array& v,
                                            const Counts& before, const Counts& after) const {
  const int batch = k.shape(0), sinks = std::min(sinks_, after.offset), begin = std::min(sinks_ + before.coded, after.offset),
            count = after.offset - begin, places = sinks_ + window_;
  const auto out = (*round_)({*tables_, k, v, exact ? *exact : k},
                             {{batch, kv_heads_, 2, sinks + count, dim_},
                              {batch, kv_heads_, sinks + count, dim_},
                              exact ? exact->shape() : mx::Shape{1}},
                             {mx::float32, mx::float32, mx::uint8},
                             {before.coded, before.offset, after.coded, after.offset, sinks, begin, count},
                             {sinks + count + places, 2, batch * kv_heads_}, kRoundThreads, kFloat * round_floats(dim_));
  return {out[0], out[1], sinks, begin, exact ? std::optional(out[2]) : std::nullopt};
}

PackedKernels::Encoded PackedKernels::encode(const State& state, const Rounded& rounded, const Counts& before,
                                             const Counts& after) const {
  const int batch = state.open.shape(0), blocks = blocks_of(after.coded) - before.coded / kBlock,
            leaving = after.coded - before.coded, sides = 2 * batch * kv_heads_;
  const mx::Shape of_blocks = {batch, blocks, block_bytes_};
  const bool patched = num_errors_ > 0;
  const auto codes = (*encode_)(
      {*tables_, state.open, rounded.vectors},
      {of_blocks, patched ? mx::Shape{sides, leaving, dim_} : mx::Shape{1}, patched ? mx::Shape{sides, leaving} : mx::Shape{1}},
      {mx::uint8, mx::float32, mx::float32},
      {before.coded, before.offset, after.coded, after.offset, rounded.vectors.shape(3), rounded.sinks, blocks, most_width_},
      {blocks * kTilesOfBlock, 2, batch * kv_heads_}, kEncodingThreads, kFloat * encode_tile_floats(dim_, most_width_));
  if (!patched) return {codes[0], std::nullopt};
  const auto out = (*patch_)({*tables_, codes[0], state.open, codes[1], codes[2], *state.errors},
                             {of_blocks, state.errors->shape()}, {mx::uint8, mx::float32},
                             {before.coded, before.offset, after.coded, after.offset}, {blocks, 2, batch * kv_heads_}, kLookUpThreads, 0);
  return {out[0], out[1]};
}

mx::array PackedKernels::attend_many(const mx::array& q, const std::optional<mx::array>& closed, const mx::array& open,
                                     const Rounded& rounded, int first, int count, const Counts& before, const Counts& after,
                                     const AttentionSpec& spec) const {
  const int batch = q.shape(0), group = q.shape(1) / kv_heads_, tokens = q.shape(2), others = rounded.turned.shape(2),
            keys = count + others, reach = spec.sliding_window > 0 ? spec.sliding_window : std::numeric_limits<int>::max();
  const mx::Shape shape = {batch, kv_heads_, keys, dim_};
  const auto restored =
      (*restore_)({*tables_, closed ? *closed : open, open, rounded.vectors, rounded.turned}, {shape, shape}, {mx::float32, mx::float32},
                  {closed ? closed->shape(1) : 0, after.coded, first, count, others},
                  {tiles_of(count) + tiles_of(others), 2, batch * kv_heads_}, kLookUpThreads, kFloat * restore_floats(dim_));
  const auto keys_by_columns = mx::swapaxes(restored[0], -1, -2);
  const int step = std::clamp(kScoresAtOnce / keys / (batch * q.shape(1)), 1, tokens);
  std::vector<mx::array> results;
  for (int begin = 0; begin < tokens; begin += step) {
    const int some = std::min(step, tokens - begin), rows = batch * q.shape(1) * some;
    const auto queries = some == tokens ? q : mx::slice(q, {0, 0, begin, 0}, {batch, q.shape(1), begin + some, dim_});
    const auto scores = mx::matmul(mx::reshape(queries, {batch, kv_heads_, group * some, dim_}), keys_by_columns);
    const auto weights = (*softmax_)({scores}, {scores.shape()}, {mx::float32},
                                     {keys, some, before.offset + begin, count, sinks_ + first, rounded.sinks, rounded.begin, window_,
                                      reach, sinks_ + before.coded, spec.scale * kLog2E, spec.soft_cap * kLog2E},
                                     {rows, 1, 1}, kSoftmaxThreads, 0)[0];
    results.push_back(mx::reshape(mx::matmul(weights, restored[1]), {batch, q.shape(1), some, dim_}));
  }
  return results.size() == 1 ? results[0] : mx::concatenate(results, 2);
}

mx::array PackedKernels::attend(const mx::array& q, const std::optional<mx::array>& closed, const State& state, const Counts& counts,
                                const AttentionSpec& spec) const {
  const int batch = q.shape(0), rows = q.shape(1) / kv_heads_, sequence_heads = batch * kv_heads_,
            first_seen = spec.sliding_window > 0 ? std::max(0, counts.offset - spec.sliding_window) : 0,
            num_closed = closed ? closed->shape(1) : 0;
  const float scale = spec.scale * kLog2E, soft_cap = spec.soft_cap * kLog2E;
  const auto& exact = state.exact ? *state.exact : state.open;
  std::vector<mx::array> parts;
  int splits, exact_splits;
  const int of_fast = fast_ && first_seen == 0 && fast_->pays(counts.coded) ? fast_->splits(sequence_heads, rows, counts.coded) : 0;
  if (of_fast > 0 && of_fast < kMostParts) {
    splits = of_fast, exact_splits = 1;
    parts = fast_->attend(*tables_, q, closed ? *closed : state.open, state.open, exact, num_closed, counts.coded, counts.offset,
                          splits, scale, soft_cap);
  } else {
    // As many blocks of threads as run at once, each with a tile at least.
    const int groups = sequence_heads * row_groups(rows), tiles = tiles_of(counts.coded),
              exact_tiles = tiles_of(std::min(sinks_, counts.offset) + std::max(0, counts.offset - sinks_ - counts.coded)),
              at_once = std::clamp(kBlocksOfProcessor * cuda_processors() / groups, 1, kMostParts / 2);
    exact_splits = std::min(exact_tiles, at_once);
    // A tile each as long as few parts come of it, then several, since all parts are read again.
    splits = std::min({tiles, std::max(kFewParts, tiles / kTilesOfPart), std::max(1, at_once - exact_splits)});
    const mx::Shape of_parts = {sequence_heads, splits + exact_splits, rows};
    parts = (*attend_)({*tables_, closed ? *closed : state.open, state.open, exact, q},
                       {of_parts, of_parts, {sequence_heads, splits + exact_splits, rows, dim_}},
                       {mx::float32, mx::float32, mx::float32},
                       {num_closed, counts.coded, counts.offset, first_seen, splits, exact_splits, rows, scale, soft_cap},
                       {splits + exact_splits, sequence_heads, row_groups(rows)}, kLookUpThreads, kFloat * attention_floats(dim_));
  }
  return (*finish_)({*tables_, parts[0], parts[1], parts[2]}, {q.shape()}, {mx::float32}, {splits, exact_splits, rows},
                    {sequence_heads, (dim_ + kColumnsAtOnce - 1) / kColumnsAtOnce, row_groups(rows)}, kFinishThreads,
                    kFloat * finish_floats(dim_, kMostParts))[0];
}

}  // namespace veloxquant
