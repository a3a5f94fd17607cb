#include "veloxquant/cache/fast_attention.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "mlx/ops.h"
#include "veloxquant/cache/attention_tables.h"
#include "veloxquant/kernels/cuda/packed_units.h"
#include "veloxquant/quantize/packed_layout.h"
#include "veloxquant/quantize/rotated_pq.h"

namespace veloxquant {
namespace {

// Of smaller heads kernels of any plan are as fast.  Units are filled up to a multiple, so that few kernels have to be compiled.
constexpr int kLeastDim = 96, kUnitsAtOnce = 16;

int rounded_up(int x, int step) {
  return (x + step - 1) / step * step;
}

// What a block of threads that attends needs: an upper bound of sizeof(CodeAttention::Memory), which the source asserts, and tiles
// on their way.
struct SharedMemory {
  int key_units, value_units, warps;
  bool values_here;
  int full_dim;  // of keys that are not turned plane by plane, else 0

  int tables() const {
    const int entries = 2 * kEntries * kUnitDims * (key_units + (values_here ? value_units : 0)),
              results = warps * 4 * (16 + rounded_up(value_units, 16) * kUnitDims * kUnitDims),
              of_key_unit = 16 * (full_dim > 0 ? 1 : kTileTokens) + 16 + 32 + 4 * kUnitDims * kQueriesAtOnce +
                            static_cast<int>(sizeof(KeyUnit)) + 4,
              of_value_unit = static_cast<int>(sizeof(ValueUnit)) + 4 + 4 * kUnitDims * kQueriesAtOnce + 2 * kUnitDims;
    return std::max(entries, results) + key_units * of_key_unit + value_units * of_value_unit +
           full_dim * (16 * key_units + 2 * kTileTokens + 10 + 4 * kQueriesAtOnce) + 4 * kTileTokens +
           kPatchesAtOnce * (2 * 4 * kQueriesAtOnce + 2) + kTilesAtOnce * 4 + 2 * warps * 4 * kQueriesAtOnce + 256;
  }
  int tiles(int codes) const { return kTilesAhead * kTileTokens * warps * codes; }
  int bytes(int codes) const { return tables() + tiles(codes); }
};

mx::array bytes(const std::vector<std::uint8_t>& values) {
  return mx::array(values.data(), {static_cast<int>(values.size())}, mx::uint8);
}

mx::array floats(const std::vector<float>& values) {
  return mx::array(values.data(), {static_cast<int>(values.size())});
}

// Structures of numbers of four bytes, or of two next to each other.
template <class Struct>
mx::array numbers(const std::vector<Struct>& values) {
  static_assert(sizeof(Struct) % sizeof(std::int32_t) == 0);
  return mx::array(reinterpret_cast<const std::int32_t*>(values.data()),
                   {static_cast<int>(values.size() * sizeof(Struct) / sizeof(std::int32_t))}, mx::int32);
}

template <class T>
void append(std::vector<T>& to, const std::vector<T>& from) {
  to.insert(to.end(), from.begin(), from.end());
}

bool in_one_word(const int (&codes)[2]) {
  return codes[0] / 4 == codes[1] / 4;
}

}  // namespace

std::unique_ptr<const FastAttention> FastAttention::make(const LayerUnits& keys, const LayerUnits& values, int kv_heads, int window,
                                                         int sinks, const Rope& rope) {
  const auto key_quantizers = keys.rotated(), value_quantizers = values.rotated();
  // Heads that share tables on one side alone would need two counts.
  if (key_quantizers.empty() || value_quantizers.empty() || keys.size() != values.size()) return nullptr;
  const int dim = keys.parameters(0).dim;
  if (dim < kLeastDim) return nullptr;
  if (4 * exact_floats(dim, window + sinks) > most_shared_bytes()) return nullptr;  // exact tokens are read at once

  std::unique_ptr<FastAttention> made(new FastAttention());
  auto& self = *made;
  self.kv_heads_ = kv_heads, self.dim_ = dim, self.num_tables_ = static_cast<int>(keys.size());
  self.most_codes_ = self.most_patches_ = 0;
  int key_count = 0, value_count = 0;
  std::size_t columns = 0;
  for (const auto* side : {&key_quantizers, &value_quantizers})
    for (const auto* quantizer : *side)
      for (const auto& subspace : quantizer->subspaces())
        if (subspace.dim() > kMostWidth) return nullptr;
  // In planes where all heads' keys are.
  const bool planes = std::ranges::all_of(key_quantizers, [&](const auto* keys) { return rest_columns(*keys, rope) > 0; });
  // Bytes of planes are those of vectors, which A⁻¹ is not to be multiplied with.
  if (!planes && std::ranges::any_of(key_quantizers, [](const auto* keys) { return !keys->planes().empty(); })) return nullptr;
  if (!planes &&
      (self.dim_ % 16 != 0 || (rope.magnitude() != 1 && 2 * rope.frequencies().size() != static_cast<std::size_t>(self.dim_))))
    return nullptr;
  for (const auto* quantizer : key_quantizers) {
    if (planes) columns = std::max(columns, rest_columns(*quantizer, rope));
    key_count = std::max(key_count, rounded_up(static_cast<int>(num_units(*quantizer)), kUnitsAtOnce));
  }
  for (const auto* quantizer : value_quantizers)
    value_count = std::max(value_count, rounded_up(static_cast<int>(num_units(*quantizer)), kUnitsAtOnce));
  self.rest_columns_ = static_cast<int>(columns);

  // Blocks.
  std::vector<HeadBlocks> heads;
  bool whole = true;
  int word = 0;
  const int patch_bytes = static_cast<int>(RotatedPqQuantizer::patch_bytes(static_cast<std::size_t>(self.dim_)));
  for (std::size_t head = 0; head < static_cast<std::size_t>(kv_heads); ++head) {
    const std::size_t at = keys.size() == 1 ? 0 : head;
    int words[2], codes[2], patches[2];
    for (const std::size_t side : {0, 1}) {
      codes[side] = static_cast<int>((side == 0 ? keys : values).parameters(at).numbers.at("codes"));
      patches[side] = (side == 0 ? key_quantizers : value_quantizers)[at]->patches();
      words[side] = word;
      word += rounded_up(codes[side] * static_cast<int>(kPackedBlockTokens) + patches[side] * patch_bytes, 16) / 4;
      whole = whole && codes[side] % 4 == 0;
      self.most_patches_ = std::max(self.most_patches_, patches[side]);
    }
    heads.push_back({words[0], codes[0], patches[0], words[1], codes[1], patches[1]});
    self.most_codes_ = std::max(self.most_codes_, codes[0] + codes[1]);
  }
  self.patch_stride_ = rounded_up(self.most_patches_ * patch_bytes, 16);
  self.rest_bytes_ = 2 * key_count * kUnitDims * static_cast<int>(columns);

  // Registers of more units leave room for fewer warps.  Patches of two blocks, which a short split may touch, have to fit where
  // tiles are read later.
  SharedMemory shared{key_count, value_count, 0, true, planes ? 0 : self.dim_};
  const auto fits = [&] {
    return shared.bytes(self.most_codes_) <= most_shared_bytes() &&
           (self.most_patches_ == 0 || 2 * self.patch_stride_ + self.rest_bytes_ <= shared.tiles(self.most_codes_));
  };
  for (const bool values_here : {true, false}) {
    shared.values_here = values_here;
    for (shared.warps = planes && key_count + value_count <= 32 ? 12 : 8; shared.warps > 4 && !fits();) shared.warps -= 2;
    if (fits()) break;
  }
  // Patches of values are shared out by pairs of columns.
  if (!fits() || self.most_patches_ > kMostPatches || self.dim_ > 64 * shared.warps) return nullptr;
  self.warps_ = shared.warps;
  self.shared_bytes_ = most_shared_bytes();  // of one name there is one kernel, with the memory that its first layer asks for

  // Tables.
  std::vector<std::uint8_t> key_bytes, value_bytes;
  std::vector<KeyUnit> key_units;
  std::vector<ValueUnit> value_units;
  std::vector<float> rests, full_mean;
  std::vector<std::uint16_t> full_inverse;
  const KeyPlaces places = key_places(self.dim_, rope);
  for (const auto* quantizer : key_quantizers) {
    const auto units = static_cast<std::size_t>(key_count);
    const auto tables = planes ? key_tables(*quantizer, rope, units, columns) : rotated_key_tables(*quantizer, units);
    if (!planes) {
      append(full_inverse, inverse_fragments(*quantizer, tables.units, places));
      for (const int column : places.columns) full_mean.push_back(quantizer->mean()[static_cast<std::size_t>(column)]);
    }
    append(key_bytes, tables.tables);
    append(key_units, tables.units);
    append(rests, tables.rests);
  }
  for (const auto* quantizer : value_quantizers) {
    const auto tables = value_tables(*quantizer, static_cast<std::size_t>(value_count));
    append(value_bytes, tables.tables);
    append(value_units, tables.units);
  }
  // An array that a kernel of this kind does not read has something in it all the same.
  if (planes)
    full_inverse.resize(2), full_mean.resize(1);
  else
    rests.resize(1);
  for (const auto& unit : key_units) whole = whole && in_one_word(unit.codes);
  for (const auto& unit : value_units) whole = whole && in_one_word(unit.codes);
  self.arrays_ = {
      bytes(key_bytes), numbers(key_units), mx::astype(floats(rests), mx::float16), bytes(value_bytes), numbers(value_units),
      numbers(heads),
      // Pairs of halves.
      mx::array(reinterpret_cast<const std::int32_t*>(full_inverse.data()), {static_cast<int>(full_inverse.size() / 2)}, mx::int32),
      floats(full_mean), numbers(places.columns), numbers(places.turns)};
  const int kind[] = {key_count, value_count, shared.warps, whole, shared.values_here, shared.full_dim};
  self.kind_ = fmt::format("{}", fmt::join(kind, "_"));
  self.template_arguments_ = fmt::format("{}", fmt::join(kind, ","));
  return made;
}

bool FastAttention::pays(int coded) const {
  return coded >= 64 * static_cast<int>(kPackedBlockTokens);
}

int FastAttention::splits(int sequence_heads, int rows, int coded) const {
  // Enough for all processors, and no more tiles or patches in one than there is room for.
  const int row_groups = (rows + kQueriesAtOnce - 1) / kQueriesAtOnce, tiles = (coded + kTileTokens - 1) / kTileTokens,
            room = kTilesAhead * kTileTokens * warps_ * most_codes_,
            most_blocks = most_patches_ == 0 ? kTilesAtOnce / kTilesOfBlock
                                             : std::min({kTilesAtOnce / kTilesOfBlock, kPatchesAtOnce / most_patches_,
                                                         (room - rest_bytes_) / patch_stride_}),
            most_tiles = std::max(1, (most_blocks - 1) * kTilesOfBlock);
  return std::max({1, (tiles + most_tiles - 1) / most_tiles,
                   std::min(tiles / warps_, cuda_processors() / (sequence_heads * row_groups))});
}

std::vector<mx::array> FastAttention::attend(const mx::array& tables, const mx::array& q, const mx::array& closed,
                                             const mx::array& open, const mx::array& exact, int num_closed, int coded, int offset,
                                             int splits, float scale, float soft_cap) const {
  std::call_once(compiled_, [&] { attend_.emplace("ATTEND_FAST", kind_, std::vector{"VELOXQUANT_FAST_KIND=" + template_arguments_}); });
  const int rows = q.shape(1) / kv_heads_, sequence_heads = q.shape(0) * kv_heads_,
            row_groups = (rows + kQueriesAtOnce - 1) / kQueriesAtOnce;
  std::vector<mx::array> inputs = {tables};
  append(inputs, arrays_);
  append(inputs, {closed, open, exact, q});
  const mx::Shape of_parts = {sequence_heads, splits + 1, rows};
  return (*attend_)(inputs, {of_parts, of_parts, {sequence_heads, splits + 1, rows, dim_}},
                    {mx::float32, mx::float32, mx::float32},
                    {num_closed, coded, offset, sequence_heads, rows, num_tables_, rest_columns_, scale, soft_cap},
                    {splits, sequence_heads + blocks_of_exact(sequence_heads, splits), row_groups}, 32 * warps_, shared_bytes_);
}

}  // namespace veloxquant
