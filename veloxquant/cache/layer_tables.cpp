#include "veloxquant/cache/layer_tables.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "veloxquant/cache/attention_tables.h"
#include "veloxquant/core/parallel.h"
#include "veloxquant/kernels/cuda/packed_units.h"
#include "veloxquant/kernels/hadamard.h"
#include "veloxquant/quantize/half.h"
#include "veloxquant/quantize/packed_layout.h"
#include "veloxquant/quantize/rotated_pq.h"
#include "veloxquant/quantize/vecinfer.h"

namespace veloxquant {
namespace {

constexpr float kAbsent = 1e37f;
constexpr int kAlignment = 4;  // words that a GPU loads at a time

// The same for every method: vectors are (x − μ)·A, sub-spaces of which are entries of tables or sums of two.
struct Subspace {
  int width, stages, centroids;
  std::vector<const float*> tables;  // of each stage [centroids, width]
};

struct Unit {
  std::vector<float> mean, transform, inverse;  // [dim], [dim, dim]
  std::vector<Subspace> subspaces;
  int codes, patches;
  CodeOrder order;
};

class Words {
 public:
  template <class T>
  int add(const std::vector<T>& values) {
    static_assert(sizeof(T) % sizeof(std::int32_t) == 0);
    return add_bytes(values.data(), values.size() * sizeof(T));
  }
  int add(const std::vector<std::uint8_t>& bytes) { return add_bytes(bytes.data(), bytes.size()); }

  template <class T>
  void set(int at, const T& value) {
    std::memcpy(words_.data() + at, &value, sizeof(T));
  }

  std::vector<std::int32_t>& words() { return words_; }

 private:
  int add_bytes(const void* data, std::size_t bytes) {
    const std::size_t at = (words_.size() + kAlignment - 1) / kAlignment * kAlignment;
    words_.resize(at + (bytes + sizeof(std::int32_t) - 1) / sizeof(std::int32_t));
    if (bytes > 0) std::memcpy(words_.data() + at, data, bytes);
    return static_cast<int>(at);
  }

  std::vector<std::int32_t> words_;
};

std::vector<float> identity(std::size_t dim) {
  std::vector<float> matrix(dim * dim);
  for (std::size_t i = 0; i < dim; ++i) matrix[i * dim + i] = 1.0f;
  return matrix;
}

Unit unit_of(const RotatedPqQuantizer& quantizer) {
  Unit unit{quantizer.mean(), quantizer.transform(), quantizer.inverse(), {}, 0, quantizer.patches(), CodeOrder::kTiles};
  for (const auto& subspace : quantizer.subspaces()) {
    Subspace made{subspace.dim(), subspace.stages(), subspace.num_centroids(), {}};
    for (int stage = 0; stage < subspace.stages(); ++stage) made.tables.push_back(subspace.entry(stage, 0));
    unit.codes += made.stages;
    unit.subspaces.push_back(std::move(made));
  }
  return unit;
}

// k = z·H·diag(λ) of z = k·diag(1/λ)·H; values as they are.
Unit unit_of(const VecInferQuantizer& quantizer, Side side) {
  const auto dim = static_cast<std::size_t>(quantizer.dim());
  const int subspaces = quantizer.codebook().num_subspaces(), width = quantizer.dim() / subspaces;
  Unit unit{std::vector<float>(dim), identity(dim), {}, {}, subspaces, 0,
            side == Side::kKeys ? CodeOrder::kScan : CodeOrder::kTiles};
  if (side == Side::kKeys) {
    const auto hadamard = walsh_hadamard_matrix(dim);
    const auto factors = quantizer.smooth_factors();
    unit.inverse = hadamard;
    for (std::size_t i = 0; i < dim; ++i)
      for (std::size_t j = 0; j < dim; ++j) {
        unit.transform[i * dim + j] = hadamard[i * dim + j] / factors[i];
        unit.inverse[i * dim + j] = hadamard[i * dim + j] * factors[j];
      }
  } else {
    unit.inverse = unit.transform;
  }
  const float* entries = quantizer.codebook().entries().data();
  for (int s = 0; s < subspaces; ++s) unit.subspaces.push_back({width, 1, kEntries, {entries + s * kEntries * width}});
  return unit;
}

// By dimension, half the squared norms behind: what encode_subspace reads.
int add_encoding_table(Words& words, const Subspace& subspace) {
  std::vector<float> table;
  for (const float* entries : subspace.tables) {
    std::vector<float> norms(kEntries, kAbsent);
    for (int d = 0; d < subspace.width; ++d)
      for (int entry = 0; entry < kEntries; ++entry) {
        const bool here = entry < subspace.centroids;
        const float x = here ? entries[entry * subspace.width + d] : 0.0f;
        table.push_back(x);
        auto& norm = norms[static_cast<std::size_t>(entry)];
        if (here) norm = (d == 0 ? 0.0f : norm) + 0.5f * x * x;
      }
    table.insert(table.end(), norms.begin(), norms.end());
  }
  return words.add(table);
}

void add_encoding(Words& words, const Unit& unit, SideTables& side) {
  std::vector<EncodingSubspace> subspaces;
  int column = 0, code = 0;
  for (const auto& subspace : unit.subspaces) {
    subspaces.push_back({column, subspace.width, code, subspace.stages, add_encoding_table(words, subspace)});
    column += subspace.width, code += subspace.stages;
  }
  side.num_subspaces = static_cast<int>(subspaces.size());
  side.subspaces = words.add(subspaces);
  side.transform = words.add(unit.transform);
  side.mean = words.add(unit.mean);
}

void set_codes(TableUnit& to, const int (&codes)[2]) {
  to.codes[0] = codes[0], to.codes[1] = codes[1];
}

std::vector<TableUnit> units_of(const ValueTables& tables) {
  std::vector<TableUnit> units;
  for (const auto& unit : tables.units) {
    auto& made = units.emplace_back();
    set_codes(made, unit.codes);
    made.scale = unit.scale, made.column = unit.column, made.width = unit.width;
    std::copy_n(unit.low, kUnitDims, made.low);
  }
  return units;
}

// Of keys in planes the columns are dimensions, in their order; of others those of the rotated space.
std::vector<TableUnit> units_of(const KeyTables& tables, bool planes) {
  std::vector<TableUnit> units;
  int column = 0;
  for (const auto& unit : tables.units) {
    auto& made = units.emplace_back();
    set_codes(made, unit.codes);
    made.scale = unit.scale, made.column = column;
    made.width = planes ? static_cast<int>(std::ranges::count_if(unit.columns, [](int c) { return c >= 0; })) : unit.rest_count;
    for (std::size_t i = 0; i < kUnitDims; ++i) made.low[i] = -key_offset(unit, i) * unit.scale;
    column += made.width;
  }
  return units;
}

// Entries [256, units, 8] of one table, filled up with zeros.
std::pair<std::vector<TableUnit>, std::vector<float>> float_units(const Unit& unit) {
  std::vector<TableUnit> units;
  int column = 0, code = 0;
  for (const auto& subspace : unit.subspaces) {
    for (int begin = 0; begin < subspace.width; begin += kUnitDims)
      units.push_back({{code, code}, 1.0f, column + begin, std::min(kUnitDims, subspace.width - begin), {}, {}});
    column += subspace.width, ++code;
  }
  std::vector<float> entries(static_cast<std::size_t>(kEntries) * units.size() * kUnitDims);
  for (std::size_t u = 0; u < units.size(); ++u) {
    const auto& subspace = unit.subspaces[static_cast<std::size_t>(units[u].codes[0])];
    const int begin = units[u].column - units[u].codes[0] * subspace.width;
    for (int entry = 0; entry < kEntries; ++entry)
      for (int i = 0; i < units[u].width; ++i)
        entries[(static_cast<std::size_t>(entry) * units.size() + u) * kUnitDims + static_cast<std::size_t>(i)] =
            subspace.tables[0][entry * subspace.width + begin + i];
  }
  return {units, entries};
}

// Columns of a matrix or a vector in another order.
std::vector<float> in_order(const std::vector<float>& rows, const std::vector<int>& columns) {
  std::vector<float> ordered;
  ordered.reserve(rows.size());
  for (std::size_t row = 0; row < rows.size(); row += columns.size())
    for (const int column : columns) ordered.push_back(rows[row + static_cast<std::size_t>(column)]);
  return ordered;
}

// Why a unit is not served, or nothing.
std::string refusal(const QuantizerParameters& parameters) {
  if (parameters.dim > kMostDim || parameters.dim % 2 != 0)
    return fmt::format("heads of {} dimensions: even numbers up to {} are served", parameters.dim, kMostDim);
  if (parameters.method == rotated_pq_method().name) return {};
  if (parameters.method != vecinfer_method().name) return fmt::format("method {}", parameters.method);
  if (const auto centroids = parameters.tensors.at("codebook").shape[1]; centroids != kEntries)
    return fmt::format("vecinfer of {} centroids: {} are served", centroids, kEntries);
  return {};
}

// Of vecinfer, whose entries stay floats.
std::vector<TableUnit> add_float_entries(Words& words, const Unit& unit, SideTables& side) {
  const auto [units, entries] = float_units(unit);
  side.float_entries = 1;
  side.entries = words.add(entries);
  return units;
}

// What both sides have, the columns of A⁻¹ and μ in this order.
void add_unit(Words& words, const Unit& unit, const std::vector<TableUnit>& units, const std::vector<int>& columns, SideTables& side) {
  add_encoding(words, unit, side);
  side.num_units = static_cast<int>(units.size());
  side.units = words.add(units);
  side.inverse = words.add(in_order(unit.inverse, columns));
  side.inverse_mean = words.add(in_order(unit.mean, columns));
  side.codes = unit.codes, side.patches = unit.patches, side.order = unit.order;
}

std::vector<int> as_they_are(int dim) {
  std::vector<int> columns(static_cast<std::size_t>(dim));
  std::iota(columns.begin(), columns.end(), 0);
  return columns;
}

void add_keys(Words& words, const QuantizerParameters& parameters, const Quantizer& made, const Rope& rope, SideTables& side) {
  std::vector<int> dims = as_they_are(parameters.dim);
  std::vector<std::uint32_t> turns(static_cast<std::size_t>(parameters.dim) / 2);
  std::vector<TableUnit> units;
  Unit unit;
  if (parameters.method == rotated_pq_method().name) {
    const auto& quantizer = static_cast<const RotatedPqQuantizer&>(made);
    unit = unit_of(quantizer);
    const std::size_t columns = rest_columns(quantizer, rope), count = num_units(quantizer);
    side.planes = columns > 0;
    const auto tables = side.planes ? key_tables(quantizer, rope, count, columns) : rotated_key_tables(quantizer, count);
    units = units_of(tables, side.planes);
    side.entries = words.add(tables.tables);
    if (side.planes) {
      std::size_t at = 0;
      for (const auto& of : tables.units)
        for (std::size_t i = 0; i < kUnitDims && of.columns[i] >= 0; ++i, ++at) {
          dims[at] = of.columns[i];
          turns[at / 2] = of.turns[i / 2];
        }
    } else {
      auto places = key_places(parameters.dim, rope);
      dims = std::move(places.columns), turns = std::move(places.turns);
    }
  } else {
    unit = unit_of(static_cast<const VecInferQuantizer&>(made), Side::kKeys);
    units = add_float_entries(words, unit, side);
  }
  add_unit(words, unit, units, dims, side);
  side.dims = words.add(dims);
  side.turns = words.add(turns);
}

void add_values(Words& words, const QuantizerParameters& parameters, const Quantizer& made, SideTables& side) {
  std::vector<TableUnit> units;
  Unit unit;
  if (parameters.method == rotated_pq_method().name) {
    const auto& quantizer = static_cast<const RotatedPqQuantizer&>(made);
    unit = unit_of(quantizer);
    const auto tables = value_tables(quantizer, num_units(quantizer));
    units = units_of(tables);
    side.entries = words.add(tables.tables);
  } else {
    unit = unit_of(static_cast<const VecInferQuantizer&>(made), Side::kValues);
    units = add_float_entries(words, unit, side);
  }
  add_unit(words, unit, units, as_they_are(parameters.dim), side);
}

}  // namespace

LayerUnits::LayerUnits(const std::vector<QuantizerParameters>& parameters) : parameters_(parameters), quantizers_(parameters.size()) {
  parallel_for(parameters.size(), 1, [&](std::size_t unit, std::size_t) { quantizers_[unit] = make_quantizer(parameters[unit]); });
}

std::vector<const RotatedPqQuantizer*> LayerUnits::rotated() const {
  std::vector<const RotatedPqQuantizer*> units;
  for (std::size_t unit = 0; unit < size(); ++unit) {
    if (parameters(unit).method != rotated_pq_method().name) return {};
    units.push_back(static_cast<const RotatedPqQuantizer*>(&quantizer(unit)));
  }
  return units;
}

std::variant<LayerWords, std::string> layer_tables(const LayerUnits& keys, const LayerUnits& values, int kv_heads, int window, int sinks,
                                                   const Rope& rope) {
  for (const auto* side : {&keys, &values})
    for (std::size_t unit = 0; unit < side->size(); ++unit)
      if (auto why = refusal(side->parameters(unit)); !why.empty()) return why;
  // Entries of planes are pieces of keys, which are turned plane by plane or not at all.
  for (const auto* unit : keys.rotated())
    if (!unit->planes().empty() && rest_columns(*unit, rope) == 0) return "keys in planes that RoPE turns in part";
  Words words;
  words.words().resize((sizeof(LayerTables) + sizeof(std::int32_t) - 1) / sizeof(std::int32_t));
  const bool turned = quantizer_method(keys.parameters(0).method).keys_before_rope;
  LayerTables layer{kv_heads,
                    keys.parameters(0).dim,
                    window,
                    sinks,
                    0,
                    0,
                    0,
                    turned ? static_cast<int>(rope.frequencies().size()) : 0,
                    0,
                    turned ? rope.magnitude() : 1.0f};
  std::vector<SideTables> of_keys(keys.size()), of_values(values.size());
  for (std::size_t i = 0; i < keys.size(); ++i) add_keys(words, keys.parameters(i), keys.quantizer(i), rope, of_keys[i]);
  for (std::size_t i = 0; i < values.size(); ++i) add_values(words, values.parameters(i), values.quantizer(i), of_values[i]);

  // Blocks of heads stand after one another, keys before values.
  std::vector<SideTables> sides(2 * static_cast<std::size_t>(kv_heads));
  const int patch_bytes = static_cast<int>(RotatedPqQuantizer::patch_bytes(static_cast<std::size_t>(layer.dim)));
  for (int head = 0; head < kv_heads; ++head)
    for (const int side : {0, 1}) {
      const auto& units = side == 0 ? of_keys : of_values;
      auto& made = sides[static_cast<std::size_t>(side * kv_heads + head)];
      made = units[units.size() == 1 ? 0 : static_cast<std::size_t>(head)];
      made.word = layer.block_words, made.error = layer.num_errors;
      layer.block_words += (made.codes * static_cast<int>(kPackedBlockTokens) + made.patches * patch_bytes + 15) / 16 * 4;
      layer.num_errors += made.patches;
    }
  layer.sides = words.add(sides);
  std::vector<std::uint32_t> turns;
  for (int i = 0; i < layer.turned; ++i) turns.push_back(turns_of(rope.frequencies()[static_cast<std::size_t>(i)]));
  layer.turns = words.add(turns);
  words.set(0, layer);

  LayerWords made{std::move(words.words()), 1};
  for (const auto& side : sides) {
    const auto* subspaces = reinterpret_cast<const EncodingSubspace*>(made.words.data() + side.subspaces);
    for (int i = 0; i < side.num_subspaces; ++i) made.most_width = std::max(made.most_width, subspaces[i].width);
  }
  if (made.most_width > kMostSubspace)
    return fmt::format("sub-spaces of {} dimensions: up to {} are served", made.most_width, kMostSubspace);
  return made;
}

}  // namespace veloxquant
