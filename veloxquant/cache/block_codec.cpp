#include "veloxquant/cache/block_codec.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "veloxquant/cache/entry_layout.h"
#include "veloxquant/cache/vecinfer_codec.h"
#include "veloxquant/core/error.h"
#include "veloxquant/kernels/gemm.h"
#include "veloxquant/kernels/rope.h"
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
    restore(block, tokens, z);
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

  // In the rotated space, stride_ apart, without patches.
  void look_up_codes(const std::uint8_t* block, std::size_t tokens, float* z) const {
    for (std::size_t t = 0; t < tokens; t += kPackedTileTokens)
      sum_entries(block + t / kPackedTileTokens * codes_.tile_bytes(), std::min(kPackedTileTokens, tokens - t), pieces_,
                  z + t * stride_, stride_);
  }

  void restore(const std::uint8_t* block, std::size_t tokens, float* z) const {
    look_up_codes(block, tokens, z);
    each_patch(block, tokens, [&](std::size_t t, const std::uint8_t* bytes) {
      RotatedPqQuantizer::add_patch(bytes, {z + t * stride_, dim_});
    });
  }

  // The quantizer's bytes.
  std::vector<BytePiece> byte_pieces() const {
    std::vector<BytePiece> result;
    for (std::size_t p = 0; p < pieces_.size(); ++p)
      result.push_back({{pieces_[p].codes[0], pieces_[p].codes[1]}, &quantizer_.byte_tables()[p]});
    return result;
  }

  BlockOfTiles tiles(const CodedBlock& block) const { return {block.bytes, codes_.tile_bytes(), kPackedTileTokens, block.tokens}; }

  void look_up_entries(std::span<CodedBlock> blocks, const EntryLayout& entries) const {
    std::vector<BlockOfTiles> all;
    for (const auto& block : blocks) all.push_back(tiles(block));
    const std::uint8_t* sums = veloxquant::look_up_entries(all, entries.groups());
    for (auto& block : blocks) block.sums = sums, sums += entries.columns() * kMostTokens;
  }

  // use(token, bytes of its patch).
  template <class Use>
  void each_patch(const std::uint8_t* block, std::size_t tokens, const Use& use) const {
    const std::uint8_t* bytes = block + shape_.patches_at;
    for (std::size_t p = 0; p < RotatedPqQuantizer::patches_of(patches_, tokens); ++p, bytes += shape_.patch_bytes)
      if (bytes[0] < tokens) use(std::size_t{bytes[0]}, bytes);  // others are of a damaged file
  }

  // What patches add to rotated vectors, rests [tokens.size(), dim].  In memory of the thread, until it reads others.
  struct Patches {
    std::vector<std::size_t> tokens;
    std::vector<float> rests;
  };
  const Patches& read_patches(const CodedBlock& block) const {
    thread_local Patches patches;
    patches.tokens.clear();
    patches.rests.assign(patches_ * dim_, 0.0f);
    each_patch(block.bytes, block.tokens, [&](std::size_t t, const std::uint8_t* bytes) {
      RotatedPqQuantizer::add_patch(bytes, {patches.rests.data() + patches.tokens.size() * dim_, dim_});
      patches.tokens.push_back(t);
    });
    return patches;
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
      : RotatedPqCodec(parameters, std::move(quantizer), nullptr), entries_(byte_pieces(), EntryOrder::kPlain) {}

  void fetch() const override { entries_.fetch(); }

  void look_up(std::span<CodedBlock> blocks) const override { look_up_entries(blocks, entries_); }

  void add(const CodedBlock& block, const float* weights, std::size_t num_queries, std::size_t weight_stride,
           float* sums) const override {
    const std::size_t tokens = block.tokens;
    if (!block.sums) {
      float* z = scratch(tokens * stride_ + kLookupPadding);
      restore(block.bytes, tokens, z);
      return add_vectors(weights, num_queries, weight_stride, z, tokens, stride_, dim_, sums);
    }
    entries_.add(block.sums, tokens, weights, num_queries, weight_stride, sums);
    const auto& [patched, rests] = read_patches(block);
    if (patched.empty()) return;
    float *of_patched = scratch(num_queries * patched.size()), *to = of_patched;
    for (std::size_t r = 0; r < num_queries; ++r)
      for (const std::size_t t : patched) *to++ = weights[r * weight_stride + t];
    add_rows(of_patched, num_queries, patched.size(), rests.data(), patched.size(), dim_, dim_, sums);
  }

  // Back from the rotated space: v = z·A⁻¹ + μ.
  void finish(std::span<float> sums, std::span<const float> totals) const override {
    const std::vector<float> z(sums.begin(), sums.end());
    for (std::size_t r = 0; r < totals.size(); ++r)
      for (std::size_t i = 0; i < dim_; ++i) sums[r * dim_ + i] = totals[r] * quantizer_.mean()[i];
    add_vectors(z.data(), totals.size(), dim_, quantizer_.inverse().data(), dim_, dim_, dim_, sums.data());
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

  // Cosines and sines of a position for each plane of a row, [rows, 2, kTurnPlanes] as turn_rows takes them.
  std::vector<float> angles_of(double position) const {
    std::vector<float> angles(columns());
    for (std::size_t i = 0; i < dim_; i += 2) {
      const double angle = turns(i) ? position * rope_->frequencies()[planes_[i / 2]] : 0.0;
      angles[places_[i]] = static_cast<float>(std::cos(angle));
      angles[places_[i] + kTurnPlanes] = static_cast<float>(std::sin(angle));
    }
    return angles;
  }

  std::size_t columns() const { return scales_.size(); }
  std::size_t rows() const { return columns() / kTurnColumns; }

  // Whether the dimension at place i of order_ turns.
  bool turns(std::size_t i) const { return i < 2 * planes_.size() && !rope_->frequencies().empty(); }

  // use(column, column of the other dimension) for each plane of a row.
  template <class Use>
  void each_plane(const Use& use) const {
    for (std::size_t row = 0; row < columns(); row += kTurnColumns)
      for (std::size_t i = 0; i < kTurnPlanes; ++i) use(row + i, row + kTurnPlanes + i);
  }

  // order_ and planes_ are set.  places: where each dimension of a key, in order_, stands in a row; scales: what a whole number of
  // a column stands for, reaches: how large it can be, both [columns].
  void set_grid(std::vector<std::size_t> places, std::vector<float> scales, const std::vector<float>& reaches) {
    places_ = std::move(places), scales_ = std::move(scales);
    for (std::size_t i = 0; i < dim_; ++i)
      if (turns(i)) scales_[places_[i]] *= rope_->magnitude();
    each_plane([&](std::size_t a, std::size_t b) { plane_reaches_.push_back(std::hypot(reaches[a], reaches[b]) + 1); });  // rounded
    angles_.resize(kTurnedTokens * columns());
    for (std::size_t t = 0; t < kTurnedTokens; ++t) {
      const auto angles = angles_of(static_cast<double>(t));
      patch_angles_.insert(patch_angles_.end(), angles.begin(), angles.end());
      for (std::size_t column = 0; column < columns(); ++column)
        angles_[(column / kTurnColumns * kTurnedTokens + t) * kTurnColumns + column % kTurnColumns] =
            static_cast<std::int16_t>(std::clamp(std::lround(angles[column] * 32768.0f), -32767L, 32767L));
    }
    step_ = angles_of(-static_cast<double>(kTurnedTokens));
    for (std::size_t b = 0; b < kTurnedBlocks; ++b)
      block_angles_.push_back(angles_of(-static_cast<double>(b * kPackedBlockTokens)));
  }

  // Queries in rows, turned back to the begin of every kTurnedBlocks-th block, and times what makes whole numbers of them.
  void prepare_rows(const BlockQueries& queries, PreparedQueries& prepared) const {
    const auto& [q, num_queries, scale] = queries;
    const std::size_t size = num_queries * columns();
    std::vector<float> rows(size);
    prepared.factors.resize(num_queries);
    for (std::size_t r = 0; r < num_queries; ++r) {
      const auto at = [&](std::size_t column) -> float& {
        return rows[(column / kTurnColumns * num_queries + r) * kTurnColumns + column % kTurnColumns];
      };
      for (std::size_t i = 0; i < dim_; ++i) at(places_[i]) = q[r * dim_ + order_[i]] * scales_[places_[i]];
      // Each fits into 16 bits however it is turned, and a score into 32.
      double largest = 0, sum = 0;
      const float* reach = plane_reaches_.data();
      each_plane([&](std::size_t a, std::size_t b) {
        const double norm = std::hypot(at(a), at(b));
        largest = std::max(largest, norm), sum += norm * *reach++;
      });
      const double steps = largest > 0 ? std::min(32766.0 / largest, 0x1p31 * 0.99 / sum) : 1.0;
      for (std::size_t column = 0; column < columns(); ++column) at(column) *= static_cast<float>(steps);
      prepared.factors[r] = static_cast<float>(scale / steps);
    }
    for (std::size_t block = 0; block < prepared.num_blocks; block += kTurnedBlocks) {
      const auto angles = angles_of(-static_cast<double>(prepared.first_position + block * kPackedBlockTokens));
      prepared.turned.resize(prepared.turned.size() + size);
      turn_rows(rows.data(), this->rows(), num_queries, angles.data(), prepared.turned.data() + prepared.turned.size() - size);
    }
  }

  // Queries of a block turned back to each stretch, as they are and as whole numbers: [stretches, rows, num_queries, kTurnColumns].
  struct Turned {
    const float* rows;
    const std::int16_t* whole;
  };
  Turned turn_to_stretches(std::size_t tokens, std::size_t position, std::size_t num_queries,
                           const PreparedQueries& prepared) const {
    const std::size_t size = num_queries * columns(), stretches = (tokens + kTurnedTokens - 1) / kTurnedTokens,
                      index = (position - prepared.first_position) / kPackedBlockTokens;
    thread_local std::vector<float> rows;
    thread_local std::vector<std::int16_t> whole;
    rows.resize(stretches * size), whole.resize(stretches * size);
    turn_rows(&prepared.turned[index / kTurnedBlocks * size], this->rows(), num_queries,
              block_angles_[index % kTurnedBlocks].data(), rows.data());
    for (std::size_t s = 1; s < stretches; ++s)
      turn_rows(rows.data() + (s - 1) * size, this->rows(), num_queries, step_.data(), rows.data() + s * size);
    round_rows(rows.data(), stretches * size, whole.data());
    return {rows.data(), whole.data()};
  }

  // Adds what patches add.
  void score_patches(const CodedBlock& block, std::size_t num_queries, const Turned& queries, const PreparedQueries& prepared,
                     float* scores, std::size_t score_stride) const {
    const auto& [patched, rests] = read_patches(block);
    if (patched.empty()) return;
    thread_local std::vector<float> keys;
    keys.assign(patched.size() * columns(), 0.0f);
    add_rows(rests.data(), patched.size(), dim_, inverse_.data(), dim_, columns(), columns(), keys.data());
    add_scores(keys.data(), patched, rows(), patch_angles_.data(), {queries.rows, num_queries, prepared.factors.data()}, scores,
               score_stride);
  }

  std::vector<std::size_t> planes_, order_;  // planes that turn; the dimension that stands at each place of a key
  std::vector<std::size_t> places_;          // of these, in a row
  std::vector<float> scales_;                // [columns], with the rope's magnitude
  std::vector<float> plane_reaches_;         // of each plane of a row
  std::vector<std::int16_t> angles_;         // as KeyGrid has them
  std::vector<float> inverse_;               // from the rotated space to whole numbers, before they are rounded: [dim, columns]

 private:
  static constexpr std::size_t kTurnedBlocks = 16;  // that are turned to from the first of them

  std::vector<float> step_;                       // back by a stretch
  std::vector<float> patch_angles_;               // [kTurnedTokens, columns]
  std::vector<std::vector<float>> block_angles_;  // back by so many blocks, up to kTurnedBlocks − 1
};

// Sub-spaces that hold whole planes: A⁻¹ and μ are in the bytes, which are looked up straight into scores.
class PlaneKeysCodec : public RotatedKeysCodec {
 public:
  PlaneKeysCodec(const QuantizerParameters& parameters, RotatedPqQuantizer quantizer, const Rope& rope)
      : RotatedKeysCodec(parameters, std::move(quantizer), rope), entries_(byte_pieces(), EntryOrder::kTurned) {
    std::vector<std::size_t> planes;
    for (const auto& some : quantizer_.planes()) planes.insert(planes.end(), some.begin(), some.end());
    set_order(std::move(planes));
    // As many bits as 16 hold of a plane that is turned.
    std::vector<float> reaches;
    for (std::size_t i = 0; i < entries_.columns(); ++i)
      reaches.push_back(
          std::max(std::abs(entries_.offsets()[i]), static_cast<float>(entries_.largest()[i]) - entries_.offsets()[i]));
    float furthest = 1;
    for (std::size_t i = 0; i < reaches.size(); ++i)
      if (i % kTurnColumns < kTurnPlanes) furthest = std::max(furthest, std::hypot(reaches[i], reaches[i + kTurnPlanes]));
    shift_ = std::clamp(static_cast<int>(std::floor(std::log2(32760 / furthest))), 0, 7);
    const float step = std::ldexp(1.0f, -shift_);
    for (float& reach : reaches) reach /= step;
    for (const float offset : entries_.offsets()) offsets_.push_back(static_cast<std::int16_t>(offset / step));
    auto scales = entries_.scales();
    inverse_.resize(dim_ * entries_.columns());
    for (std::size_t i = 0; i < dim_; ++i)
      for (std::size_t j = 0; j < dim_; ++j) {
        const std::size_t place = entries_.places()[j];
        inverse_[i * entries_.columns() + place] = quantizer_.inverse()[i * dim_ + order_[j]] / (scales[place] * step);
      }
    for (float& scale : scales) scale *= step;
    set_grid(entries_.places(), std::move(scales), reaches);
  }

  void fetch() const override { entries_.fetch(); }

  void look_up(std::span<CodedBlock> blocks) const override { look_up_entries(blocks, entries_); }

  void prepare(const BlockQueries& queries, PreparedQueries& prepared) const override {
    prepared.turned.clear();
    if (queries.num_queries < kManyQueries) prepare_rows(queries, prepared);
  }

  void score(const CodedBlock& block, std::size_t position, const BlockQueries& queries, const PreparedQueries& prepared,
             float* scores, std::size_t score_stride) const override {
    const std::size_t num_queries = queries.num_queries, tokens = block.tokens;
    if (prepared.turned.empty()) return BlockCodec::score(block, position, queries, prepared, scores, score_stride);
    const Turned q = turn_to_stretches(tokens, position, num_queries, prepared);
    score_bytes(block.sums, tokens, rows(), {offsets_.data(), shift_, angles_.data()},
                {q.whole, num_queries, prepared.factors.data()}, scores, score_stride);
    score_patches(block, num_queries, q, prepared, scores, score_stride);
  }

 private:
  EntryLayout entries_;
  int shift_ = 0;
  std::vector<std::int16_t> offsets_;  // times 2^shift_
};

// Any sub-spaces: keys are a product with A⁻¹.  Of few blocks it is one, a block at a time; for many, it is made of every entry
// once, and keys are sums of those.
class FullKeysCodec : public RotatedKeysCodec {
 public:
  FullKeysCodec(const QuantizerParameters& parameters, RotatedPqQuantizer quantizer, const Rope& rope)
      : RotatedKeysCodec(parameters, std::move(quantizer), rope) {
    std::vector<std::size_t> planes(rope.frequencies().size());
    std::iota(planes.begin(), planes.end(), std::size_t{0});
    set_order(std::move(planes));
    const std::size_t columns = (dim_ + kTurnColumns - 1) / kTurnColumns * kTurnColumns;
    std::vector<std::size_t> places;
    for (std::size_t i = 0; i < dim_; ++i)
      places.push_back(i / kTurnColumns * kTurnColumns + i % 2 * kTurnPlanes + i % kTurnColumns / 2);
    for (const auto& piece : pieces_) codes_of_tables_ += piece.tables[1] ? 2 : 1;
    // How large sums of entries can be, from those of each table; one step for each plane, whose two dimensions are turned.
    mean_.resize(columns), inverse_.resize(dim_ * columns);
    for (std::size_t j = 0; j < dim_; ++j) {
      mean_[places[j]] = quantizer_.mean()[order_[j]];
      for (std::size_t i = 0; i < dim_; ++i) inverse_[i * columns + places[j]] = quantizer_.inverse()[i * dim_ + order_[j]];
    }
    std::vector<float> reaches(columns, 1.0f), scales(columns, 1.0f), entries(256 * columns);
    for (std::size_t j = 0; j < columns; ++j) reaches[j] = std::abs(mean_[j]);
    each_table([&](const LookupPiece& piece, std::size_t, const float* table) {
      multiply(piece, table, entries.data());
      for (std::size_t j = 0; j < columns; ++j) {
        float largest = 0;
        for (std::size_t entry = 0; entry < 256; ++entry) largest = std::max(largest, std::abs(entries[entry * columns + j]));
        reaches[j] += largest;
      }
    });
    for (std::size_t a = 0; a < columns; ++a) {
      if (a % kTurnColumns >= kTurnPlanes) continue;
      const std::size_t b = a + kTurnPlanes;
      const float reach = std::max(std::hypot(reaches[a], reaches[b]), std::numeric_limits<float>::min());
      // Each entry is rounded.
      const float step = reach / (32760.0f - static_cast<float>(codes_of_tables_));
      for (const std::size_t i : {a, b}) {
        scales[i] = step, reaches[i] /= step, mean_[i] /= step;
        for (std::size_t row = 0; row < dim_; ++row) inverse_[row * columns + i] /= step;
      }
    }
    set_grid(std::move(places), std::move(scales), reaches);
  }

  void prepare(const BlockQueries& queries, PreparedQueries& prepared) const override {
    prepared.turned.clear(), prepared.wide.clear();
    if (queries.num_queries >= kManyQueries) return;
    prepare_rows(queries, prepared);
    if (prepared.num_blocks * kPackedBlockTokens < kTokensOfTables) return;
    // [rows, codes, 256, kTurnColumns]; μ in the first table.
    const std::size_t wide = columns();
    prepared.wide.resize(codes_of_tables_ * 256 * wide);
    thread_local std::vector<float> entries;
    thread_local std::vector<std::int16_t> whole;
    entries.resize(256 * wide), whole.resize(256 * wide);
    each_table([&](const LookupPiece& piece, std::size_t code, const float* table) {
      multiply(piece, table, entries.data());
      for (std::size_t entry = 0; entry < 256 && code == 0; ++entry)
        for (std::size_t j = 0; j < wide; ++j) entries[entry * wide + j] += mean_[j];
      round_rows(entries.data(), entries.size(), whole.data());
      for (std::size_t row = 0; row < rows(); ++row)
        for (std::size_t entry = 0; entry < 256; ++entry)
          std::copy_n(&whole[entry * wide + row * kTurnColumns], kTurnColumns,
                      &prepared.wide[((row * codes_of_tables_ + code) * 256 + entry) * kTurnColumns]);
    });
  }

  void score(const CodedBlock& block, std::size_t position, const BlockQueries& queries, const PreparedQueries& prepared,
             float* scores, std::size_t score_stride) const override {
    const std::size_t num_queries = queries.num_queries, tokens = block.tokens;
    if (prepared.turned.empty()) return BlockCodec::score(block, position, queries, prepared, scores, score_stride);
    const Turned q = turn_to_stretches(tokens, position, num_queries, prepared);
    thread_local std::vector<std::int16_t> keys;
    keys.resize((tokens + kTurnedTokens) * columns());
    if (prepared.wide.empty()) {
      thread_local std::vector<float> decoded;
      decoded.resize(tokens * columns());
      decode_rows(block.bytes, tokens, decoded.data());
      round_rows(decoded.data(), decoded.size(), keys.data());
    } else {
      std::vector<CodePlace> places;
      for (const auto& piece : pieces_)
        for (std::size_t stage = 0; stage < 2; ++stage)
          if (piece.tables[stage]) places.push_back(piece.codes[stage]);
      sum_wide_entries(tiles(block), places, prepared.wide.data(), rows(), keys.data());
    }
    score_wide(keys.data(), tokens, rows(), {nullptr, 0, angles_.data()}, {q.whole, num_queries, prepared.factors.data()}, scores,
               score_stride);
    score_patches(block, num_queries, q, prepared, scores, score_stride);
  }

 private:
  // From so many tokens on, tables of every entry times A⁻¹ are made sooner than as many keys.
  static constexpr std::size_t kTokensOfTables = 2048;

  // use(piece, which code, table [256, width]) for each table.
  template <class Use>
  void each_table(const Use& use) const {
    std::size_t code = 0;
    for (const auto& piece : pieces_)
      for (std::size_t stage = 0; stage < 2; ++stage)
        if (piece.tables[stage]) use(piece, code++, piece.tables[stage]);
  }

  // rows [256, columns] = the entries of a table times A⁻¹.
  void multiply(const LookupPiece& piece, const float* table, float* rows) const {
    const auto columns = static_cast<int>(inverse_.size() / dim_), width = static_cast<int>(piece.width);
    gemm(false, false, 256, columns, width, 1.0f, table, width, &inverse_[piece.column * static_cast<std::size_t>(columns)],
         columns, 0.0f, rows, columns);
  }

  // Keys before they are turned, without patches, as whole numbers would be, [tokens, columns].
  void decode_rows(const std::uint8_t* block, std::size_t tokens, float* rows) const {
    const int n = static_cast<int>(tokens), d = static_cast<int>(dim_), c = static_cast<int>(columns());
    float* z = scratch(tokens * stride_ + kLookupPadding);
    look_up_codes(block, tokens, z);
    for (std::size_t t = 0; t < tokens; ++t) std::copy(mean_.begin(), mean_.end(), rows + t * columns());
    gemm(false, false, n, c, d, 1.0f, z, static_cast<int>(stride_), inverse_.data(), c, 1.0f, rows, c);
  }

  std::size_t codes_of_tables_ = 0;
  std::vector<float> mean_;  // μ [columns], as whole numbers would be
};

}  // namespace

void BlockCodec::score(const CodedBlock& block, std::size_t position, const BlockQueries& queries, const PreparedQueries&,
                       float* scores, std::size_t score_stride) const {
  const std::size_t tokens = block.tokens;
  thread_local std::vector<float> keys;
  keys.resize(tokens * dim_);
  decode(block.bytes, tokens, keys.data());
  if (rope_ && !rope_->frequencies().empty()) {
    const MutableStridedView view{keys.data(), 0, 0, static_cast<std::ptrdiff_t>(dim_)};
    rope({1, 1, tokens, dim_}, {keys.data(), 0, 0, static_cast<std::ptrdiff_t>(dim_)}, rope_->frequencies(), rope_->magnitude(),
         static_cast<std::ptrdiff_t>(position), view);
  }
  score_vectors(queries, keys.data(), tokens, dim_, dim_, scores, score_stride);
}

void BlockCodec::add(const CodedBlock& block, const float* weights, std::size_t num_queries, std::size_t weight_stride,
                     float* sums) const {
  thread_local std::vector<float> values;
  values.resize(block.tokens * dim_);
  decode(block.bytes, block.tokens, values.data());
  add_vectors(weights, num_queries, weight_stride, values.data(), block.tokens, dim_, dim_, sums);
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
