#include "veloxquant/cache/packed_kernels.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <numbers>
#include <variant>

#include "mlx/backend/cuda/cuda.h"
#include "mlx/device.h"
#include "mlx/ops.h"
#include "veloxquant/cache/attention_tables.h"
#include "veloxquant/kernels/cuda/sources.h"
#include "veloxquant/quantize/rotated_pq.h"

namespace veloxquant {
namespace {

// Of the GPU that the kernels are tuned on: more splits than processors would wait for each other.
constexpr int kProcessors = 132;

constexpr int kMostSplits = 1024;

// What the kernels read is what the CPU writes.
static_assert(kTileTokens == kPackedTileTokens && kTileTokens * kTilesOfBlock == kPackedBlockTokens);
static_assert(kBeam == RotatedPqQuantizer::kBeam && kPatchCentre == RotatedPqQuantizer::kPatchCentre);

constexpr float kLog2E = std::numbers::log2e_v<float>, kAbsent = 1e37f;

// Of shared memory, at most, for a block of threads on this GPU, by its compute capability (CUDA C++ Programming Guide, "Compute
// capabilities"); 0 where it lacks instructions that the kernels are made of.
int most_shared_bytes() {
  const auto& info = mx::device_info(mx::Device::gpu);
  const auto number = [&](const char* name) {
    const auto found = info.find(name);
    const auto* value = found == info.end() ? nullptr : std::get_if<std::size_t>(&found->second);
    return value ? *value : 0;
  };
  const auto major = number("compute_capability_major"), minor = number("compute_capability_minor");
  if (major < 8) return 0;
  if (major == 9 || major == 10) return 227 * 1024;
  return (major == 8 && (minor == 0 || minor == 7) ? 163 : 99) * 1024;
}

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

mx::array floats(const std::vector<float>& values) {
  return mx::array(values.data(), {static_cast<int>(values.size())});
}

mx::array bytes(const std::vector<std::uint8_t>& values) {
  return mx::array(values.data(), {static_cast<int>(values.size())}, mx::uint8);
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

// Where the codes of heads stand in a block, and what encodes them.
struct Encoding {
  std::vector<EncodingSubspace> subspaces;  // filled up for each side of each head
  std::vector<EncodingHead> heads;
  std::vector<float> transform, mean, tables;

  void add(const RotatedPqQuantizer& quantizer, std::size_t most_subspaces) {
    veloxquant::append(transform, quantizer.transform());
    veloxquant::append(mean, quantizer.mean());
    const std::size_t end = subspaces.size() + most_subspaces;
    int column = 0, code = 0;
    for (const auto& subspace : quantizer.subspaces()) {
      subspaces.push_back({column, subspace.dim(), code, subspace.stages(), static_cast<int>(tables.size())});
      for (int stage = 0; stage < subspace.stages(); ++stage) {
        std::vector<float> norms(kEntries, kAbsent);
        for (int d = 0; d < subspace.dim(); ++d)
          for (int entry = 0; entry < kEntries; ++entry) {
            const bool here = entry < subspace.num_centroids();
            const float x = here ? subspace.entry(stage, static_cast<std::size_t>(entry))[d] : 0.0f;
            tables.push_back(x);
            auto& norm = norms[static_cast<std::size_t>(entry)];
            if (here) norm = (d == 0 ? 0.0f : norm) + 0.5f * x * x;
          }
        veloxquant::append(tables, norms);
      }
      column += subspace.dim(), code += subspace.stages();
    }
    subspaces.resize(end);
  }
};

// What all kernels begin with.  Numbers come from arrays that are on the GPU already, and from shapes.
const std::string kBegin = R"(
using namespace veloxquant;
const PackedLayout& layout = *reinterpret_cast<const PackedLayout*>(layout_of);
const PackedCounts& counts = *reinterpret_cast<const PackedCounts*>(counts_of);
)";

const std::string kQueries = R"(
extern __shared__ uint4 shared_memory[];
const QueryRows rows{queries, static_cast<int>(queries_shape[1]) / layout.kv_heads, layout.dim, settings[0], settings[1], layout.sinks, settings[2]};
)";

constexpr const char* kAttend = R"(
static_assert(sizeof(CodeAttention<{0}>::Memory) <= {1}, "room for the tables");
const AttentionCodes codes{{reinterpret_cast<const unsigned*>(closed_blocks), reinterpret_cast<const unsigned*>(open_block),
                           counts.coded / (kTileTokens * kTilesOfBlock), layout.block_words, counts.coded, layout.kv_heads}};
const AttentionTables tables{{key_tables, value_tables, reinterpret_cast<const KeyUnit*>(key_units),
                             reinterpret_cast<const ValueUnit*>(value_units), reinterpret_cast<const __half*>(key_rests),
                             reinterpret_cast<const HeadBlocks*>(heads),
                             {{reinterpret_cast<const uint2*>(full_inverse), full_mean, full_columns, reinterpret_cast<const unsigned*>(full_turns)}},
                             layout.num_tables, layout.rest_columns}};
const ExactTokens exact{{exact_tokens, layout.sinks, layout.window, counts.coded, counts.offset,
                        reinterpret_cast<const unsigned*>(turns), layout.turned}};
const AttentionParts parts{{maxima, totals, sums}};
attend_packed<{0}>(codes, rows, tables, exact, static_cast<int>(queries_shape[0]) * layout.kv_heads, parts, shared_memory);
)";

constexpr const char* kFinish = R"(
const AttentionParts parts{const_cast<float*>(maxima), const_cast<float*>(totals), const_cast<float*>(sums)};
const ValueSpace space{inverse, mean, layout.num_tables};
finish_attention(parts, static_cast<int>(maxima_shape[1]) - 1, layout.kv_heads, rows, space, out, shared_memory);
)";

constexpr const char* kEncode = R"(
const EncodingTables tables{{transform, mean, entries, reinterpret_cast<const EncodingSubspace*>(subspaces),
                            reinterpret_cast<const EncodingHead*>(heads), layout.num_tables, layout.most_subspaces}};
const EncodingState state{{exact_tokens, open_block, reinterpret_cast<const float*>(errors), counts, new_exact, new_open, new_errors,
                          reinterpret_cast<PackedCounts*>(new_counts), layout.sinks, layout.window, 4 * layout.block_words, layout.num_errors}};
encode_token<{0}>(new_keys, new_values, tables, state, layout.kv_heads);
)";

}  // namespace

std::unique_ptr<const PackedKernels> PackedKernels::make(const std::vector<QuantizerParameters>& keys,
                                                         const std::vector<QuantizerParameters>& values, int kv_heads, int window,
                                                         int sinks, const Rope& rope) {
  if (mx::default_device() != mx::Device::gpu || !mx::cu::is_available()) return nullptr;
  const auto ours = [](const auto& side) {
    return std::all_of(side.begin(), side.end(), [](const auto& unit) { return unit.method == rotated_pq_method().name; });
  };
  const int most_shared = most_shared_bytes();
  // Heads that share tables on one side alone would need two counts.
  if (!ours(keys) || !ours(values) || keys.size() != values.size()) return nullptr;
  if (4 * exact_floats(keys[0].dim, window + sinks) > most_shared) return nullptr;  // exact tokens are read at once
  const std::vector<RotatedPqQuantizer> key_quantizers(keys.begin(), keys.end()), value_quantizers(values.begin(), values.end());

  std::unique_ptr<PackedKernels> made(new PackedKernels());
  auto& self = *made;
  self.kv_heads_ = kv_heads, self.dim_ = keys[0].dim, self.window_ = window, self.sinks_ = sinks,
  self.magnitude_ = rope.magnitude();
  self.key_units_ = self.value_units_ = self.most_codes_ = self.most_patches_ = 0;
  std::size_t columns = 0, most_subspaces = 0;
  for (const auto* side : {&key_quantizers, &value_quantizers})
    for (const auto& quantizer : *side) {
      most_subspaces = std::max(most_subspaces, quantizer.subspaces().size());
      for (const auto& subspace : quantizer.subspaces())
        if (subspace.dim() > kMostWidth) return nullptr;
    }
  // In planes where all heads' keys are.
  const bool planes = std::ranges::all_of(key_quantizers, [&](const auto& keys) { return rest_columns(keys, rope) > 0; });
  // Bytes of planes are those of vectors, which A⁻¹ is not to be multiplied with.
  if (!planes && std::ranges::any_of(key_quantizers, [](const auto& keys) { return !keys.planes().empty(); })) return nullptr;
  if (!planes &&
      (self.dim_ % 16 != 0 || (rope.magnitude() != 1 && 2 * rope.frequencies().size() != static_cast<std::size_t>(self.dim_))))
    return nullptr;
  for (const auto& quantizer : key_quantizers) {
    if (planes) columns = std::max(columns, rest_columns(quantizer, rope));
    self.key_units_ = std::max(self.key_units_, rounded_up(static_cast<int>(num_units(quantizer)), 8));
  }
  for (const auto& quantizer : value_quantizers)
    self.value_units_ = std::max(self.value_units_, rounded_up(static_cast<int>(num_units(quantizer)), 8));

  // Blocks.
  Encoding encoding;
  std::vector<HeadBlocks> heads;
  bool whole = true;
  int word = 0, error = 0;
  const int patch_bytes = static_cast<int>(RotatedPqQuantizer::patch_bytes(static_cast<std::size_t>(self.dim_)));
  std::vector<EncodingHead> encoding_values;
  for (std::size_t head = 0; head < static_cast<std::size_t>(kv_heads); ++head) {
    const std::size_t at = keys.size() == 1 ? 0 : head;
    const auto place = [&](const RotatedPqQuantizer& quantizer, const QuantizerParameters& parameters) {
      const int codes = static_cast<int>(parameters.numbers.at("codes"));
      const EncodingHead placed{word, codes, quantizer.patches(), static_cast<int>(quantizer.subspaces().size()), error};
      word += rounded_up(codes * static_cast<int>(kPackedBlockTokens) + placed.patches * patch_bytes, 16) / 4;
      error += placed.patches;
      whole = whole && codes % 4 == 0;
      self.most_patches_ = std::max(self.most_patches_, placed.patches);
      return placed;
    };
    const auto k = encoding.heads.emplace_back(place(key_quantizers[at], keys[at])),
               v = encoding_values.emplace_back(place(value_quantizers[at], values[at]));
    heads.push_back({k.word, k.codes, k.patches, v.word, v.codes, v.patches});
    self.most_codes_ = std::max(self.most_codes_, k.codes + v.codes);
  }
  veloxquant::append(encoding.heads, encoding_values);
  self.patch_stride_ = rounded_up(self.most_patches_ * patch_bytes, 16);
  self.rest_bytes_ = 2 * self.key_units_ * kUnitDims * static_cast<int>(columns);

  // Registers of more units leave room for fewer warps.  Patches of two blocks, which a short split may touch, have to fit where
  // tiles are read later.
  SharedMemory shared{self.key_units_, self.value_units_, 0, true, planes ? 0 : self.dim_};
  const auto fits = [&] {
    return shared.bytes(self.most_codes_) <= most_shared &&
           (self.most_patches_ == 0 || 2 * self.patch_stride_ + self.rest_bytes_ <= shared.tiles(self.most_codes_));
  };
  for (const bool values_here : {true, false}) {
    shared.values_here = values_here;
    for (shared.warps = planes && self.key_units_ + self.value_units_ <= 32 ? 12 : 8; shared.warps > 4 && !fits();)
      shared.warps -= 2;
    if (fits()) break;
  }
  // Patches of values are shared out by pairs of columns.
  if (!fits() || self.most_patches_ > kMostPatches || self.dim_ > 64 * shared.warps) return nullptr;
  self.warps_ = shared.warps;

  // Tables.
  std::vector<std::uint8_t> key_bytes, value_bytes;
  std::vector<KeyUnit> key_units;
  std::vector<ValueUnit> value_units;
  std::vector<float> rests, inverse, mean, full_mean;
  std::vector<std::uint16_t> full_inverse;
  const KeyPlaces places = key_places(self.dim_, rope);
  for (const auto& quantizer : key_quantizers) {
    const auto units = static_cast<std::size_t>(self.key_units_);
    const auto tables = planes ? key_tables(quantizer, rope, units, columns) : rotated_key_tables(quantizer, units);
    if (!planes) {
      veloxquant::append(full_inverse, inverse_fragments(quantizer, tables.units, places));
      for (const int column : places.columns) full_mean.push_back(quantizer.mean()[static_cast<std::size_t>(column)]);
    }
    veloxquant::append(key_bytes, tables.tables);
    veloxquant::append(key_units, tables.units);
    veloxquant::append(rests, tables.rests);
    encoding.add(quantizer, most_subspaces);
  }
  for (const auto& quantizer : value_quantizers) {
    const auto tables = value_tables(quantizer, static_cast<std::size_t>(self.value_units_));
    veloxquant::append(value_bytes, tables.tables);
    veloxquant::append(value_units, tables.units);
    veloxquant::append(inverse, quantizer.inverse());
    veloxquant::append(mean, quantizer.mean());
    encoding.add(quantizer, most_subspaces);
  }
  // An array that a kernel of this kind does not read has something in it all the same.
  if (planes)
    full_inverse.resize(2), full_mean.resize(1);
  else
    rests.resize(1);
  for (const auto& unit : key_units) whole = whole && in_one_word(unit.codes);
  for (const auto& unit : value_units) whole = whole && in_one_word(unit.codes);
  std::vector<std::uint32_t> turns;
  for (const float radians : rope.frequencies()) turns.push_back(turns_of(radians));
  const auto layout = numbers(
      std::vector<PackedLayout>{{kv_heads, self.dim_, window, sinks, word, static_cast<int>(keys.size()), static_cast<int>(columns),
                                 static_cast<int>(turns.size()), error, static_cast<int>(most_subspaces)}});
  self.attention_ = {
      layout, bytes(key_bytes), numbers(key_units), mx::astype(floats(rests), mx::float16), bytes(value_bytes),
      numbers(value_units), numbers(heads), numbers(turns),
      // Pairs of halves.
      mx::array(reinterpret_cast<const std::int32_t*>(full_inverse.data()), {static_cast<int>(full_inverse.size() / 2)}, mx::int32),
      floats(full_mean), numbers(places.columns), numbers(places.turns)};
  self.back_ = {layout, floats(inverse), floats(mean)};
  self.encoding_ = {layout,
                    floats(encoding.transform),
                    floats(encoding.mean),
                    floats(encoding.tables),
                    numbers(encoding.subspaces),
                    numbers(encoding.heads)};

  // Compiled by MLX when they are first called; of one name there is one.
  const int kind[] = {self.key_units_, self.value_units_, self.warps_, whole, shared.values_here, shared.full_dim};
  self.attend_ = mx::fast::cuda_kernel(
      fmt::format("packed_attention_{}", fmt::join(kind, "_")),
      {"counts_of", "queries", "settings", "closed_blocks", "open_block", "exact_tokens", "layout_of", "key_tables", "key_units",
       "key_rests", "value_tables", "value_units", "heads", "turns", "full_inverse", "full_mean", "full_columns", "full_turns"},
      {"maxima", "totals", "sums"},
      kBegin + kQueries + fmt::format(fmt::runtime(kAttend), fmt::format("{}", fmt::join(kind, ", ")), shared.tables()),
      kAttentionSource, true, most_shared);  // of one name there is one, with the memory that its first layer asks for
  self.finish_ = mx::fast::cuda_kernel(
      fmt::format("packed_attention_end_{}", self.dim_),
      {"counts_of", "queries", "settings", "maxima", "totals", "sums", "layout_of", "inverse", "mean"}, {"out"},
      kBegin + kQueries + kFinish, kAttentionEndSource, true, 4 * finish_floats(self.dim_, kMostSplits));
  self.encode_ = mx::fast::cuda_kernel(fmt::format("packed_encoding_{}", self.dim_),
                                       {"counts_of", "new_keys", "new_values", "exact_tokens", "open_block", "errors", "layout_of",
                                        "transform", "mean", "entries", "subspaces", "heads"},
                                       {"new_exact", "new_open", "new_errors", "new_counts"},
                                       kBegin + fmt::format(fmt::runtime(kEncode), self.dim_), kEncodingSource, true, 0);
  return made;
}

mx::array PackedKernels::counts(int coded, int offset) {
  return numbers(std::vector<PackedCounts>{{coded, offset}});
}

PackedKernels::State PackedKernels::append(const State& state, const mx::array& k, const mx::array& v) const {
  std::vector<mx::array> inputs = {
      state.counts, k, v, state.exact ? *state.exact : state.open, state.open, state.errors ? *state.errors : state.counts};
  veloxquant::append(inputs, encoding_);
  const auto shape_of = [](const std::optional<mx::array>& x) { return x ? x->shape() : mx::Shape{1}; };
  const auto out = encode_(inputs, {shape_of(state.exact), state.open.shape(), shape_of(state.errors), state.counts.shape()},
                           {mx::uint8, mx::uint8, mx::float32, mx::int32}, {2 * kEncodingThreads, k.shape(0) * kv_heads_, 1},
                           {kEncodingThreads, 1, 1}, {}, std::nullopt, false, {});
  State next{std::nullopt, out[1], std::nullopt, out[3]};
  if (state.exact) next.exact = out[0];
  if (state.errors) next.errors = out[2];
  return next;
}

mx::array PackedKernels::attend(const mx::array& q, const std::optional<mx::array>& closed, const State& state, int coded,
                                const AttentionSpec& spec) const {
  const int batch = q.shape(0), rows = q.shape(1) / kv_heads_, sequence_heads = batch * kv_heads_,
            row_groups = (rows + kQueriesAtOnce - 1) / kQueriesAtOnce, tiles = (coded + kTileTokens - 1) / kTileTokens;
  // Enough splits for all processors, and no more tiles or patches in one than there is room for.
  const int room = kTilesAhead * kTileTokens * warps_ * most_codes_,
            most_blocks = most_patches_ == 0 ? kTilesAtOnce / kTilesOfBlock
                                             : std::min({kTilesAtOnce / kTilesOfBlock, kPatchesAtOnce / most_patches_,
                                                         (room - rest_bytes_) / patch_stride_}),
            most_tiles = std::max(1, (most_blocks - 1) * kTilesOfBlock),
            splits = std::max(
                {1, (tiles + most_tiles - 1) / most_tiles, std::min(tiles / warps_, kProcessors / (sequence_heads * row_groups))});
  if (splits > kMostSplits)
    throw std::runtime_error(fmt::format("[packed cache] {} tokens are more than attention on a GPU takes", coded));
  // One layer has one scale, which needs not be brought to the GPU again.
  const std::lock_guard lock(settings_mutex_);
  if (!settings_ || settings_of_ != std::pair(spec.scale, spec.soft_cap)) {
    settings_of_ = {spec.scale, spec.soft_cap};
    settings_ = mx::array({spec.scale * kLog2E, spec.soft_cap * kLog2E, magnitude_});
  }

  std::vector<mx::array> inputs = {
      state.counts, q, *settings_, closed ? *closed : state.open, state.open, state.exact ? *state.exact : state.open};
  veloxquant::append(inputs, attention_);
  const mx::Shape of_parts = {sequence_heads, splits + 1, rows};
  const int threads = 32 * warps_, exact_rows = blocks_of_exact(sequence_heads, splits);
  const auto parts =
      attend_(inputs, {of_parts, of_parts, {sequence_heads, splits + 1, rows, dim_}}, {mx::float32, mx::float32, mx::float32},
              {splits * threads, sequence_heads + exact_rows, row_groups}, {threads, 1, 1}, {}, std::nullopt, false, {});
  std::vector<mx::array> parts_and_space = {state.counts, q, *settings_, parts[0], parts[1], parts[2]};
  veloxquant::append(parts_and_space, back_);
  return finish_(parts_and_space, {q.shape()}, {mx::float32},
                 {sequence_heads * kFinishThreads, (dim_ + kColumnsAtOnce - 1) / kColumnsAtOnce, row_groups},
                 {kFinishThreads, 1, 1}, {}, std::nullopt, false, {})[0];
}

}  // namespace veloxquant
