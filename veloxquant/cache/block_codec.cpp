#include "veloxquant/cache/block_codec.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "veloxquant/cache/entry_layout.h"
#include "veloxquant/cache/vecinfer_codec.h"
#include "veloxquant/core/error.h"
#include "veloxquant/kernels/gemm.h"
#include "veloxquant/kernels/rope.h"
#include "veloxquant/quantize/folded_planes.h"
#include "veloxquant/quantize/rotated_pq.h"

namespace veloxquant {
void score_vectors(const BlockQueries& queries, const float* k, std::size_t tokens, std::size_t stride, std::size_t dim,
                   float* scores, std::size_t score_stride) {
  if (queries.num_queries < kManyQueries)
    return score_rows(queries.q, queries.num_queries, k, tokens, stride, dim, queries.scale, scores, score_stride);
  gemm(false, true, static_cast<int>(queries.num_queries), static_cast<int>(tokens), static_cast<int>(dim), queries.scale,
       queries.q, static_cast<int>(dim), k, static_cast<int>(stride), 0.0f, scores, static_cast<int>(score_stride));
}

void add_vectors(const float* weights, std::size_t num_queries, std::size_t weight_stride, const float* v, std::size_t tokens,
                 std::size_t stride, std::size_t dim, float* sums) {
  if (num_queries < kManyQueries) return add_rows(weights, num_queries, weight_stride, v, tokens, stride, dim, sums);
  gemm(false, false, static_cast<int>(num_queries), static_cast<int>(dim), static_cast<int>(tokens), 1.0f, weights,
       static_cast<int>(weight_stride), v, static_cast<int>(stride), 1.0f, sums, static_cast<int>(dim));
}

namespace {

constexpr std::size_t kTableEntries = 256;  // any byte is a code

float* scratch(std::size_t size) {
  thread_local std::vector<float> memory;
  memory.resize(std::max(memory.size(), size));
  return memory.data();
}

// Any quantizer that stores tokens one by one: token after token.
class PlainCodec : public BlockCodec {
 public:
  explicit PlainCodec(const QuantizerParameters& parameters)
      : BlockCodec(parameters, nullptr), quantizer_(make_quantizer(parameters)), token_bytes_(quantizer_->encoded_bytes(1)) {}

  void append(std::span<const float> vectors, std::size_t at, std::uint8_t* block, OpenBlock&) const override {
    quantizer_->encode(vectors, {block + at * token_bytes_, vectors.size() / dim_ * token_bytes_});
  }

  void decode(const std::uint8_t* block, std::size_t tokens, float* vectors) const override {
    quantizer_->decode({block, tokens * token_bytes_}, {vectors, tokens * dim_});
  }

 private:
  std::unique_ptr<const Quantizer> quantizer_;
  std::size_t token_bytes_;
};

// rotated_pq: codes in tiles (packed_layout.h), then the patches, ascending in place.
class RotatedPqCodec : public BlockCodec {
 public:
  RotatedPqCodec(const QuantizerParameters& parameters, RotatedPqQuantizer quantizer, const Rope* rope)
      : BlockCodec(parameters, rope),
        quantizer_(std::move(quantizer)),
        codes_{shape_.token_bytes()},
        patches_(shape_.patches),
        stride_(dim_ + kLookupPadding) {
    tables_.reserve(2 * quantizer_.subspaces().size());
    std::size_t column = 0, code = 0;
    for (const auto& subspace : quantizer_.subspaces()) {
      LookupPiece piece{column, static_cast<std::size_t>(subspace.dim()), {}, {}};
      for (int stage = 0; stage < subspace.stages(); ++stage, ++code) {
        piece.codes[stage] = codes_.place(code);
        piece.tables[stage] = add_table(subspace, stage);
      }
      pieces_.push_back(piece);
      column += piece.width;
    }
  }

  void append(std::span<const float> vectors, std::size_t at, std::uint8_t* block, OpenBlock& open) const override {
    const std::size_t tokens = vectors.size() / dim_, count = codes_.codes;
    std::vector<std::uint8_t> codes(tokens * count);
    std::vector<float> rest(patches_ > 0 ? tokens * dim_ : 0);
    quantizer_.encode_codes(vectors, codes, rest);
    for (std::size_t t = 0; t < tokens; ++t) {
      for (std::size_t code = 0; code < count; ++code) block[shape_.place(code, at + t)] = codes[t * count + code];
      if (patches_ > 0) offer_patch(std::span(rest).subspan(t * dim_, dim_), at + t, block + shape_.patches_at, open);
    }
  }

  void decode(const std::uint8_t* block, std::size_t tokens, float* vectors) const override {
    float* z = scratch(tokens * stride_ + kLookupPadding);
    look_up(block, tokens, z);
    const int d = static_cast<int>(dim_);
    for (std::size_t t = 0; t < tokens; ++t) std::copy(quantizer_.mean().begin(), quantizer_.mean().end(), vectors + t * dim_);
    gemm(false, false, static_cast<int>(tokens), d, d, 1.0f, z, static_cast<int>(stride_), quantizer_.inverse().data(), d, 1.0f,
         vectors, d);
  }

 protected:
  // Entries of a table as they are looked up, with room to read beyond.
  const float* add_table(const AdditiveCodebook& subspace, int stage) {
    const auto size = static_cast<std::size_t>(subspace.num_centroids()) * static_cast<std::size_t>(subspace.dim());
    // Any byte is a code: those beyond the centroids are never written, and read as zeros from a damaged file.
    auto& table = tables_.emplace_back(kTableEntries * static_cast<std::size_t>(subspace.dim()) + kLookupPadding);
    std::copy_n(subspace.entry(stage, 0), size, table.begin());
    return table.data();
  }

  // In the rotated space, stride_ apart.
  void look_up(const std::uint8_t* block, std::size_t tokens, float* z) const {
    for (std::size_t t = 0; t < tokens; t += kPackedTileTokens)
      sum_entries(block + t / kPackedTileTokens * codes_.tile_bytes(), std::min(kPackedTileTokens, tokens - t), pieces_,
                  z + t * stride_, stride_);
    each_patch(block, tokens, [&](std::size_t t, const std::uint8_t* bytes) {
      RotatedPqQuantizer::add_patch(bytes, {z + t * stride_, dim_});
    });
  }

  BlockOfTiles tiles(const std::uint8_t* block, std::size_t tokens) const {
    return {block, codes_.tile_bytes(), kPackedTileTokens, tokens};
  }

  // use(token, bytes of its patch).
  template <class Use>
  void each_patch(const std::uint8_t* block, std::size_t tokens, const Use& use) const {
    const std::uint8_t* bytes = block + shape_.patches_at;
    for (std::size_t p = 0; p < RotatedPqQuantizer::patches_of(patches_, tokens); ++p, bytes += shape_.patch_bytes)
      if (bytes[0] < tokens) use(std::size_t{bytes[0]}, bytes);  // others are of a damaged file
  }

  // What a patch adds to a rotated vector, [dim].
  void read_patch(const std::uint8_t* bytes, float* rest) const {
    std::fill_n(rest, dim_, 0.0f);
    RotatedPqQuantizer::add_patch(bytes, {rest, dim_});
  }

  RotatedPqQuantizer quantizer_;
  PackedCodes codes_;
  std::size_t patches_, stride_;
  std::vector<LookupPiece> pieces_;

 private:
  // The tokens that lose most have the patches: one that loses more takes the place of the one that loses least.
  void offer_patch(std::span<const float> rest, std::size_t place, std::uint8_t* patches, OpenBlock& open) const {
    if (place == 0) open.patch_errors.clear();
    const float error = RotatedPqQuantizer::patch_error(rest);
    auto& errors = open.patch_errors;
    const std::size_t bytes = shape_.patch_bytes;
    if (errors.size() == patches_) {
      // Of equal ones the later goes.
      std::size_t least = 0;
      for (std::size_t p = 1; p < errors.size(); ++p)
        if (errors[p] <= errors[least]) least = p;
      if (error <= errors[least]) return;
      errors.erase(errors.begin() + static_cast<std::ptrdiff_t>(least));
      std::copy(patches + (least + 1) * bytes, patches + patches_ * bytes, patches + least * bytes);
    }
    quantizer_.write_patch(rest, place, patches + errors.size() * bytes);
    errors.push_back(error);
  }

  std::vector<std::vector<float>> tables_;
};

class RotatedValuesCodec : public RotatedPqCodec {
 public:
  RotatedValuesCodec(const QuantizerParameters& parameters, RotatedPqQuantizer quantizer)
      : RotatedPqCodec(parameters, std::move(quantizer), nullptr), entries_(pieces_) {}

  void add(const std::uint8_t* block, std::size_t tokens, const float* weights, std::size_t num_queries, std::size_t weight_stride,
           float* sums) const override {
    if (num_queries >= kManyQueries) {
      float* z = scratch(tokens * stride_ + kLookupPadding);
      look_up(block, tokens, z);
      return add_vectors(weights, num_queries, weight_stride, z, tokens, stride_, dim_, sums);
    }
    entries_.add(tiles(block, tokens), weights, num_queries, weight_stride, sums);
    float* rest = scratch(dim_);
    each_patch(block, tokens, [&](std::size_t t, const std::uint8_t* bytes) {
      read_patch(bytes, rest);
      add_rows(weights + t, num_queries, weight_stride, rest, 1, dim_, dim_, sums);
    });
  }

  // Back from the rotated space: v = z·A⁻¹ + μ.
  void finish(std::span<float> sums, std::span<const float> totals) const override {
    const std::vector<float> z(sums.begin(), sums.end());
    const int d = static_cast<int>(dim_);
    for (std::size_t r = 0; r < totals.size(); ++r)
      for (std::size_t i = 0; i < dim_; ++i) sums[r * dim_ + i] = totals[r] * quantizer_.mean()[i];
    gemm(false, false, static_cast<int>(totals.size()), d, d, 1.0f, z.data(), d, quantizer_.inverse().data(), d, 1.0f, sums.data(),
         d);
  }

 private:
  EntryLayout entries_;
};

// Keys of rotated_pq, and few queries: keys come in an order in which the two dimensions of a plane are neighbours, and are turned
// on the way to their scores, by their place in a stretch of kTurnedTokens; queries are turned back to where that begins.
class RotatedKeysCodec : public RotatedPqCodec {
 public:
  RotatedKeysCodec(const QuantizerParameters& parameters, RotatedPqQuantizer quantizer, const Rope& rope)
      : RotatedPqCodec(parameters, std::move(quantizer), &rope) {}

 protected:
  // Both dimensions of each plane, then those that do not turn.
  void set_order(std::vector<std::size_t> planes) {
    planes_ = std::move(planes);
    for (const std::size_t plane : planes_) order_.insert(order_.end(), {plane, plane + planes_.size()});
    for (std::size_t i = order_.size(); i < dim_; ++i) order_.push_back(i);
  }

  // Cosines and sines of a position, as turn_pairs takes them.
  void append_angles(double position, float magnitude, std::vector<float>& cosines, std::vector<float>& sines) const {
    for (const std::size_t plane : planes_) {
      const double angle = rope_->frequencies().empty() ? 0.0 : position * rope_->frequencies()[plane];
      const auto c = magnitude * static_cast<float>(std::cos(angle)), s = magnitude * static_cast<float>(std::sin(angle));
      cosines.insert(cosines.end(), {c, c});
      sines.insert(sines.end(), {-s, s});
    }
    cosines.insert(cosines.end(), dim_ - 2 * planes_.size(), 1.0f);
    sines.insert(sines.end(), dim_ - 2 * planes_.size(), 0.0f);
  }

  std::vector<std::size_t> planes_, order_;  // planes that turn; the dimension that stands at each place of a key
};

// Sub-spaces that hold whole planes: A⁻¹ and μ are in the tables, which are looked up straight into scores.
class PlaneKeysCodec : public RotatedKeysCodec {
 public:
  PlaneKeysCodec(const QuantizerParameters& parameters, RotatedPqQuantizer quantizer, const Rope& rope)
      : RotatedKeysCodec(parameters, std::move(quantizer), rope) {
    const auto folded = folded_planes(quantizer_);
    set_order(planes_of(folded));
    std::vector<std::vector<float>> tables;
    entries_ = EntryLayout(folded_pieces(folded, tables));
    for (std::size_t i = 0; i < dim_; ++i) {
      inverse_.resize((i + 1) * entries_.columns());
      for (std::size_t j = 0; j < dim_; ++j)
        inverse_[i * entries_.columns() + entries_.places()[j]] = quantizer_.inverse()[i * dim_ + order_[j]];
    }
    angles_.resize(kTurnedTokens * 2 * entries_.columns());
    for (std::size_t t = 0; t < kTurnedTokens; ++t) {
      const auto angles = angles_of(static_cast<double>(t), rope.magnitude());
      for (std::size_t g = 0; g < entries_.groups().size(); ++g)
        std::copy_n(&angles[g * kGroupAngles], kGroupAngles, &angles_[(g * kTurnedTokens + t) * kGroupAngles]);
    }
    step_ = angles_of(-static_cast<double>(kTurnedTokens), 1.0f);
    for (std::size_t b = 0; b < kTurnedBlocks; ++b)
      block_angles_.push_back(angles_of(-static_cast<double>(b * kPackedBlockTokens), 1.0f));
  }

  // Queries in groups of columns, scaled, and turned back to the begin of every kTurnedBlocks-th block.
  void prepare(const BlockQueries& queries, PreparedQueries& prepared) const override {
    const auto& [q, num_queries, scale] = queries;
    if (num_queries >= kManyQueries) return;
    const std::size_t size = num_queries * entries_.columns();
    std::vector<float> grouped(size);
    for (std::size_t r = 0; r < num_queries; ++r)
      for (std::size_t i = 0; i < dim_; ++i) {
        const std::size_t place = entries_.places()[i];
        grouped[(place / kEntryColumns * num_queries + r) * kEntryColumns + place % kEntryColumns] =
            scale * q[r * dim_ + order_[i]];
      }
    for (std::size_t block = 0; block < prepared.num_blocks; block += kTurnedBlocks) {
      const auto angles = angles_of(-static_cast<double>(prepared.first_position + block * kPackedBlockTokens), 1.0f);
      prepared.turned.resize(prepared.turned.size() + size);
      turn_rows(grouped.data(), entries_.groups().size(), num_queries, angles.data(),
                prepared.turned.data() + prepared.turned.size() - size);
    }
  }

  void score(const std::uint8_t* block, std::size_t tokens, std::size_t position, const BlockQueries& queries,
             const PreparedQueries& prepared, float* scores, std::size_t score_stride) const override {
    if (prepared.turned.empty()) return BlockCodec::score(block, tokens, position, queries, prepared, scores, score_stride);
    const std::size_t num_queries = queries.num_queries, groups = entries_.groups().size(), size = num_queries * entries_.columns(),
                      stretches = (tokens + kTurnedTokens - 1) / kTurnedTokens,
                      index = (position - prepared.first_position) / kPackedBlockTokens;
    float* q = scratch(stretches * size + dim_ + entries_.columns());
    turn_rows(&prepared.turned[index / kTurnedBlocks * size], groups, num_queries, block_angles_[index % kTurnedBlocks].data(), q);
    for (std::size_t s = 1; s < stretches; ++s) turn_rows(q + (s - 1) * size, groups, num_queries, step_.data(), q + s * size);
    score_entries(tiles(block, tokens), entries_.groups(), {q, num_queries, angles_.data()}, scores, score_stride);
    float *rest = q + stretches * size, *key = rest + dim_;
    each_patch(block, tokens, [&](std::size_t t, const std::uint8_t* bytes) {
      read_patch(bytes, rest);
      patch_key(rest, t % kTurnedTokens, key);
      const float* turned = q + t / kTurnedTokens * size;
      for (std::size_t r = 0; r < num_queries; ++r) {
        float sums[kEntryColumns] = {};
        for (std::size_t g = 0; g < groups; ++g)
          for (std::size_t i = 0; i < kEntryColumns; ++i)
            sums[i] += key[g * kEntryColumns + i] * turned[(g * num_queries + r) * kEntryColumns + i];
        scores[r * score_stride + t] += std::accumulate(sums, sums + kEntryColumns, 0.0f);
      }
    });
  }

 private:
  static constexpr std::size_t kTurnedBlocks = 16;                // that are turned to from the first of them
  static constexpr std::size_t kGroupAngles = 2 * kEntryColumns;  // cosines and sines

  // Of a position, [groups, 2, kEntryColumns].
  std::vector<float> angles_of(double position, float magnitude) const {
    std::vector<float> cosines, sines, angles(2 * entries_.columns());
    append_angles(position, magnitude, cosines, sines);
    for (std::size_t i = 0; i < dim_; ++i) {
      const std::size_t place = entries_.places()[i], at = place / kEntryColumns * kGroupAngles + place % kEntryColumns;
      angles[at] = cosines[i];
      angles[at + kEntryColumns] = sines[i];
    }
    return angles;
  }

  static std::vector<std::size_t> planes_of(const std::vector<FoldedSubspace>& folded) {
    std::vector<std::size_t> planes;
    for (const auto& subspace : folded) planes.insert(planes.end(), subspace.planes.begin(), subspace.planes.end());
    return planes;
  }

  // As EntryLayout reads them, with tables that stand in `memory`.
  std::vector<LookupPiece> folded_pieces(const std::vector<FoldedSubspace>& folded,
                                         std::vector<std::vector<float>>& memory) const {
    std::vector<LookupPiece> pieces = pieces_;
    memory.reserve(2 * pieces.size());
    for (std::size_t p = 0; p < pieces.size(); ++p)
      for (std::size_t stage = 0; stage < folded[p].tables->entries.size(); ++stage) {
        auto& table = memory.emplace_back(kTableEntries * pieces[p].width);
        for (std::size_t i = 0; i < folded[p].tables->entries[stage].size(); ++i)
          table[i] = folded[p].tables->value(stage, i / pieces[p].width, i % pieces[p].width);
        pieces[p].tables[stage] = table.data();
      }
    return pieces;
  }

  // What a patch adds to a key, in groups of columns, turned by its place in a stretch.
  void patch_key(const float* rest, std::size_t turned, float* key) const {
    const std::size_t columns = entries_.columns();
    thread_local std::vector<float> plain;
    plain.assign(columns, 0.0f);
    for (const auto& piece : pieces_) {
      const std::size_t begin = entries_.places()[piece.column] / kEntryColumns * kEntryColumns,
                        end = entries_.places()[piece.column + piece.width - 1] / kEntryColumns * kEntryColumns + kEntryColumns;
      for (std::size_t i = piece.column; i < piece.column + piece.width; ++i)
        for (std::size_t j = begin; j < end; ++j) plain[j] += rest[i] * inverse_[i * columns + j];
    }
    for (std::size_t g = 0; g < entries_.groups().size(); ++g) {
      const float *angles = &angles_[(g * kTurnedTokens + turned) * kGroupAngles], *x = &plain[g * kEntryColumns];
      for (std::size_t i = 0; i < kEntryColumns; ++i)
        key[g * kEntryColumns + i] = x[i] * angles[i] + x[i ^ 1] * angles[kEntryColumns + i];
    }
  }

  EntryLayout entries_;
  std::vector<float> inverse_;                    // A⁻¹ [dim, columns]
  std::vector<float> angles_;                     // [groups, kTurnedTokens, 2, kEntryColumns]
  std::vector<float> step_;                       // back by a stretch
  std::vector<std::vector<float>> block_angles_;  // back by so many blocks, up to kTurnedBlocks − 1
};

// Any sub-spaces: keys are a product with A⁻¹, a block at a time.
class FullKeysCodec : public RotatedKeysCodec {
 public:
  FullKeysCodec(const QuantizerParameters& parameters, RotatedPqQuantizer quantizer, const Rope& rope)
      : RotatedKeysCodec(parameters, std::move(quantizer), rope) {
    std::vector<std::size_t> planes(rope.frequencies().size());
    std::iota(planes.begin(), planes.end(), std::size_t{0});
    set_order(std::move(planes));
    for (std::size_t i = 0; i < dim_; ++i)
      for (std::size_t j = 0; j < dim_; ++j) inverse_.push_back(quantizer_.inverse()[i * dim_ + order_[j]]);
    for (const std::size_t i : order_) mean_.push_back(quantizer_.mean()[i]);
    for (std::size_t t = 0; t < kTurnedTokens; ++t) append_angles(static_cast<double>(t), rope.magnitude(), cosines_, sines_);
    append_angles(-static_cast<double>(kTurnedTokens), 1.0f, step_cosines_, step_sines_);
  }

  void score(const std::uint8_t* block, std::size_t tokens, std::size_t position, const BlockQueries& queries,
             const PreparedQueries& prepared, float* scores, std::size_t score_stride) const override {
    if (queries.num_queries >= kManyQueries)
      return BlockCodec::score(block, tokens, position, queries, prepared, scores, score_stride);
    thread_local std::vector<float> q, keys;
    turn_back(queries, position, q);
    keys.resize(tokens * stride_);
    decode_in_order(block, tokens, keys.data());
    for (std::size_t t = 0; t < tokens; t += kTurnedTokens) {
      score_turned_rows(q.data(), queries.num_queries, keys.data() + t * stride_, std::min(kTurnedTokens, tokens - t), stride_,
                        dim_, cosines_.data(), sines_.data(), queries.scale, scores + t, score_stride);
      for (std::size_t r = 0; r < queries.num_queries; ++r)
        turn_pairs(q.data() + r * dim_, 1, dim_, dim_, step_cosines_.data(), step_sines_.data());
    }
  }

 private:
  // Keys in order_, not turned, stride_ apart.
  void decode_in_order(const std::uint8_t* block, std::size_t tokens, float* keys) const {
    const int n = static_cast<int>(tokens), d = static_cast<int>(dim_), stride = static_cast<int>(stride_);
    float* z = scratch(tokens * stride_ + kLookupPadding);
    look_up(block, tokens, z);
    for (std::size_t t = 0; t < tokens; ++t) std::copy(mean_.begin(), mean_.end(), keys + t * stride_);
    gemm(false, false, n, d, d, 1.0f, z, stride, inverse_.data(), d, 1.0f, keys, stride);
  }

  // Queries in order_, turned back by `position`: exact at the begin of a block, in steps from there.
  void turn_back(const BlockQueries& queries, std::size_t position, std::vector<float>& out) const {
    thread_local std::vector<float> cosines, sines;
    cosines.clear(), sines.clear();
    append_angles(-static_cast<double>(position), 1.0f, cosines, sines);
    out.resize(queries.num_queries * dim_);
    for (std::size_t r = 0; r < queries.num_queries; ++r) {
      for (std::size_t i = 0; i < dim_; ++i) out[r * dim_ + i] = queries.q[r * dim_ + order_[i]];
      turn_pairs(out.data() + r * dim_, 1, dim_, dim_, cosines.data(), sines.data());
    }
  }

  std::vector<float> inverse_, mean_;             // of the quantizer, in order_
  std::vector<float> cosines_, sines_;            // [kTurnedTokens, dim]
  std::vector<float> step_cosines_, step_sines_;  // [dim]: back by kTurnedTokens positions
};

}  // namespace

void BlockCodec::score(const std::uint8_t* block, std::size_t tokens, std::size_t position, const BlockQueries& queries,
                       const PreparedQueries&, float* scores, std::size_t score_stride) const {
  thread_local std::vector<float> keys;
  keys.resize(tokens * dim_);
  decode(block, tokens, keys.data());
  if (rope_ && !rope_->frequencies().empty()) {
    const MutableStridedView view{keys.data(), 0, 0, static_cast<std::ptrdiff_t>(dim_)};
    rope({1, 1, tokens, dim_}, {keys.data(), 0, 0, static_cast<std::ptrdiff_t>(dim_)}, rope_->frequencies(), rope_->magnitude(),
         static_cast<std::ptrdiff_t>(position), view);
  }
  score_vectors(queries, keys.data(), tokens, dim_, dim_, scores, score_stride);
}

void BlockCodec::add(const std::uint8_t* block, std::size_t tokens, const float* weights, std::size_t num_queries,
                     std::size_t weight_stride, float* sums) const {
  thread_local std::vector<float> values;
  values.resize(tokens * dim_);
  decode(block, tokens, values.data());
  add_vectors(weights, num_queries, weight_stride, values.data(), tokens, dim_, dim_, sums);
}

void BlockCodec::finish(std::span<float>, std::span<const float>) const {}

void check_packable(const QuantizerParameters& parameters) {
  if (parameters.method == rotated_pq_method().name) return;
  if (const int group = make_quantizer(parameters)->token_group(); group != 1)
    throw_invalid("packed cache", "{} groups {} tokens: expected a method that stores tokens one by one", parameters.method, group);
}

BlockShape block_shape(const QuantizerParameters& parameters) {
  BlockShape shape{.order = TokenOrder::kTiles, .bytes = 0, .patches_at = 0, .patches = 0, .patch_bytes = 0, .dim = parameters.dim};
  if (parameters.method != rotated_pq_method().name) {
    check_packable(parameters);
    if (!has_vecinfer_codec(parameters))
      shape.order = TokenOrder::kPlain;
    else if (parameters.side == Side::kKeys)
      shape.order = TokenOrder::kScan;
    shape.bytes = shape.patches_at = make_quantizer(parameters)->encoded_bytes(1) * kPackedBlockTokens;
    return shape;
  }
  shape.patches_at = PackedCodes{static_cast<std::size_t>(parameters.numbers.at("codes"))}.block_bytes();
  shape.patches = static_cast<std::size_t>(parameters.numbers.at("patches"));
  shape.patch_bytes = RotatedPqQuantizer::patch_bytes(static_cast<std::size_t>(parameters.dim));
  shape.bytes = shape.patches_at + shape.patches * shape.patch_bytes;
  return shape;
}

void trim_block(const BlockShape& shape, std::size_t held, std::size_t tokens, std::uint8_t* block, OpenBlock& open) {
  if (shape.patches == 0) return;
  struct Patch {
    std::vector<std::uint8_t> bytes;
    float error;
  };
  const std::size_t wanted = RotatedPqQuantizer::patches_of(shape.patches, tokens), bytes = shape.patch_bytes;
  std::uint8_t* at = block + shape.patches_at;
  std::vector<Patch> kept;
  for (std::size_t p = 0; p < RotatedPqQuantizer::patches_of(shape.patches, held); ++p) {
    const std::uint8_t* patch = at + p * bytes;
    if (patch[0] >= tokens) continue;
    std::vector<float> rest(static_cast<std::size_t>(shape.dim));
    RotatedPqQuantizer::add_patch(patch, rest);
    kept.push_back(
        {{patch, patch + bytes}, p < open.patch_errors.size() ? open.patch_errors[p] : RotatedPqQuantizer::patch_error(rest)});
  }
  // Those of zeros stand first, at place 0.
  while (kept.size() > wanted) kept.erase(kept.begin());
  kept.insert(kept.begin(), wanted - kept.size(), {std::vector<std::uint8_t>(bytes), 0.0f});
  open.patch_errors.clear();
  for (const auto& [patch, error] : kept) {
    at = std::copy(patch.begin(), patch.end(), at);
    open.patch_errors.push_back(error);
  }
  std::fill(at, block + shape.patches_at + shape.patches * bytes, std::uint8_t{0});
}

std::shared_ptr<const BlockCodec> make_block_codec(const QuantizerParameters& parameters, const Rope* rope) {
  const bool keys = parameters.side == Side::kKeys;
  if (parameters.method == rotated_pq_method().name) {
    RotatedPqQuantizer quantizer(parameters);
    if (!keys) return std::make_shared<RotatedValuesCodec>(parameters, std::move(quantizer));
    const std::size_t turned = 2 * rope->frequencies().size();
    const bool whole_planes = turned == 0 || turned == static_cast<std::size_t>(parameters.dim);
    if (quantizer.planes().empty() || !whole_planes)
      return std::make_shared<FullKeysCodec>(parameters, std::move(quantizer), *rope);
    return std::make_shared<PlaneKeysCodec>(parameters, std::move(quantizer), *rope);
  }
  check_packable(parameters);
  if (has_vecinfer_codec(parameters)) return make_vecinfer_codec(parameters);
  return std::make_shared<PlainCodec>(parameters);
}

}  // namespace veloxquant
