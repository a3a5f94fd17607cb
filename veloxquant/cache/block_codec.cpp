#include "veloxquant/cache/block_codec.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include "veloxquant/core/error.h"
#include "veloxquant/kernels/gemm.h"
#include "veloxquant/kernels/rope.h"
#include "veloxquant/quantize/rotated_pq.h"

namespace veloxquant {
namespace {

// From here on a matrix product pays for packing its operands.
constexpr std::size_t kManyQueries = 12;

}  // namespace

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

float* scratch(std::size_t size) {
  thread_local std::vector<float> memory;
  memory.resize(std::max(memory.size(), size));
  return memory.data();
}

// Any quantizer that stores tokens one by one: token after token.
class PlainCodec : public BlockCodec {
 public:
  PlainCodec(std::unique_ptr<const Quantizer> quantizer, const Rope* rope)
      : BlockCodec(quantizer->dim(), rope), quantizer_(std::move(quantizer)), token_bytes_(quantizer_->encoded_bytes(1)) {}

  std::size_t block_bytes() const override { return token_bytes_ * kPackedBlockTokens; }

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
  RotatedPqCodec(const QuantizerParameters& parameters, const Rope* rope)
      : BlockCodec(parameters.dim, rope),
        quantizer_(parameters),
        codes_{static_cast<std::size_t>(parameters.numbers.at("codes"))},
        patches_(static_cast<std::size_t>(quantizer_.patches())),
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

  std::size_t block_bytes() const override { return codes_.block_bytes() + patches_ * quantizer_.patch_bytes(); }

  void append(std::span<const float> vectors, std::size_t at, std::uint8_t* block, OpenBlock& open) const override {
    const std::size_t tokens = vectors.size() / dim_, count = codes_.codes;
    std::vector<std::uint8_t> codes(tokens * count);
    std::vector<float> rest(tokens * dim_);
    quantizer_.encode_codes(vectors, codes, rest);
    for (std::size_t t = 0; t < tokens; ++t) {
      std::uint8_t* tile = block + (at + t) / kPackedTileTokens * codes_.tile_bytes();
      for (std::size_t code = 0; code < count; ++code) {
        const auto [offset, stride] = codes_.place(code);
        tile[offset + (at + t) % kPackedTileTokens * stride] = codes[t * count + code];
      }
      offer_patch(std::span(rest).subspan(t * dim_, dim_), at + t, block + codes_.block_bytes(), open);
    }
  }

  void decode(const std::uint8_t* block, std::size_t tokens, float* vectors) const override {
    std::vector<float> z(tokens * dim_ + kLookupPadding);
    rotated(block, tokens, z.data(), dim_);
    const int d = static_cast<int>(dim_);
    for (std::size_t t = 0; t < tokens; ++t) std::copy(quantizer_.mean().begin(), quantizer_.mean().end(), vectors + t * dim_);
    gemm(false, false, static_cast<int>(tokens), d, d, 1.0f, z.data(), d, quantizer_.inverse().data(), d, 1.0f, vectors, d);
  }

  void add(const std::uint8_t* block, std::size_t tokens, const float* weights, std::size_t num_queries, std::size_t weight_stride,
           float* sums) const override {
    // A tile's vectors stay in the first-level cache between look-up and sum.
    float* z = scratch(kPackedTileTokens * stride_ + kLookupPadding);
    const std::size_t step = num_queries < kManyQueries ? kPackedTileTokens : kPackedBlockTokens;
    if (step > kPackedTileTokens) z = scratch(step * stride_ + kLookupPadding);
    for (std::size_t begin = 0; begin < tokens; begin += step) {
      const std::size_t some = std::min(step, tokens - begin);
      look_up(block, begin, some, z);
      patch(block, begin, some, tokens, z);
      add_vectors(weights + begin, num_queries, weight_stride, z, some, stride_, dim_, sums);
    }
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

 protected:
  // Entries of a table as they are looked up, with room to read beyond.
  const float* add_table(const AdditiveCodebook& subspace, int stage) {
    const auto size = static_cast<std::size_t>(subspace.num_centroids()) * static_cast<std::size_t>(subspace.dim());
    // Any byte is a code: those beyond the centroids are never written, and read as zeros from a damaged file.
    auto& table = tables_.emplace_back(256 * static_cast<std::size_t>(subspace.dim()) + kLookupPadding);
    std::copy_n(subspace.entry(stage, 0), size, table.begin());
    return table.data();
  }

  std::size_t held_patches(std::size_t tokens) const { return RotatedPqQuantizer::patches_of(patches_, tokens); }

  // Tokens begin … begin + tokens − 1 of a block, begin at a tile, stride_ apart.
  void look_up(const std::uint8_t* block, std::size_t begin, std::size_t tokens, float* z) const {
    for (std::size_t t = 0; t < tokens; t += kPackedTileTokens)
      sum_entries(block + (begin + t) / kPackedTileTokens * codes_.tile_bytes(), std::min(kPackedTileTokens, tokens - t), pieces_,
                  z + t * stride_, stride_);
  }

  // Adds the patches of these tokens; `held` tokens are in the block.
  void patch(const std::uint8_t* block, std::size_t begin, std::size_t tokens, std::size_t held, float* z) const {
    const std::uint8_t* bytes = block + codes_.block_bytes();
    for (std::size_t p = 0; p < held_patches(held); ++p, bytes += quantizer_.patch_bytes())
      if (bytes[0] >= begin && bytes[0] < begin + tokens) quantizer_.add_patch(bytes, z + (bytes[0] - begin) * stride_);
  }

  RotatedPqQuantizer quantizer_;
  PackedCodes codes_;
  std::size_t patches_, stride_;
  std::vector<LookupPiece> pieces_;

 private:
  void rotated(const std::uint8_t* block, std::size_t tokens, float* z, std::size_t stride) const {
    std::vector<float> padded(tokens * stride_ + kLookupPadding);
    look_up(block, 0, tokens, padded.data());
    patch(block, 0, tokens, tokens, padded.data());
    for (std::size_t t = 0; t < tokens; ++t) std::copy_n(padded.data() + t * stride_, dim_, z + t * stride);
  }

  // The tokens that lose most have the patches: one that loses more takes the place of the one that loses least.
  void offer_patch(std::span<const float> rest, std::size_t place, std::uint8_t* patches, OpenBlock& open) const {
    if (patches_ == 0) return;
    if (place == 0) open.patch_errors.clear();
    float error = 0;
    for (const float value : rest) error += value * value;
    auto& errors = open.patch_errors;
    const std::size_t bytes = quantizer_.patch_bytes();
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

// Keys whose sub-spaces hold whole planes: entries come out of the tables as keys, plane by plane, and are turned as they are.
class PlaneKeysCodec : public RotatedPqCodec {
 public:
  // None where A is not made of blocks of planes.
  static std::shared_ptr<const BlockCodec> make(const QuantizerParameters& parameters, const Rope& rope) {
    auto codec = std::make_shared<PlaneKeysCodec>(parameters, rope);
    return codec->planes_.empty() ? nullptr : codec;
  }

  PlaneKeysCodec(const QuantizerParameters& parameters, const Rope& rope) : RotatedPqCodec(parameters, &rope) {
    if (rope.frequencies().size() * 2 != dim_ || !find_planes()) {
      planes_.clear();
      return;
    }
    fold();
    for (std::size_t t = 0; t < kTurned; ++t) append_angles(t, cosines_, sines_);
    append_angles(kTurned, step_cosines_, step_sines_);
    for (float& sine : step_sines_) sine = -sine;  // queries turn back
  }

  void score(const std::uint8_t* block, std::size_t tokens, std::size_t position, const BlockQueries& queries, float* scores,
             std::size_t score_stride) const override {
    if (queries.num_queries >= kManyQueries) return BlockCodec::score(block, tokens, position, queries, scores, score_stride);
    thread_local std::vector<float> turned;
    turn_back(queries, position, turned);
    float* k = scratch(kPackedTileTokens * stride_ + kLookupPadding);
    const float scale = queries.scale * rope_->magnitude();
    for (std::size_t begin = 0; begin < tokens; begin += kPackedTileTokens) {
      const std::size_t some = std::min(kPackedTileTokens, tokens - begin);
      sum_entries(block + begin / kPackedTileTokens * codes_.tile_bytes(), some, folded_, k, stride_);
      patch_keys(block, begin, some, tokens, k);
      // Keys turn by their place in a stretch, queries back by where that begins.
      for (std::size_t t = 0; t < some; t += kTurned) {
        score_turned_rows(turned.data(), queries.num_queries, k + t * stride_, std::min(kTurned, some - t), stride_, dim_,
                          cosines_.data(), sines_.data(), scale, scores + begin + t, score_stride);
        for (std::size_t r = 0; r < queries.num_queries; ++r)
          turn_pairs(turned.data() + r * dim_, 1, dim_, dim_, step_cosines_.data(), step_sines_.data());
      }
    }
  }

 private:
  static constexpr std::size_t kTurned = 8;

  // Cosines and sines of a position, as turn_pairs takes them.
  void append_angles(std::size_t position, std::vector<float>& cosines, std::vector<float>& sines) const {
    for (const std::size_t plane : planes_) {
      const double angle = static_cast<double>(position) * rope_->frequencies()[plane];
      const auto c = static_cast<float>(std::cos(angle)), s = static_cast<float>(std::sin(angle));
      cosines.insert(cosines.end(), {c, c});
      sines.insert(sines.end(), {-s, s});
    }
  }

  // The planes in the order of the sub-spaces: plane i is dimensions i and i + dim/2.
  bool find_planes() {
    const auto& transform = quantizer_.transform();
    const std::size_t half = dim_ / 2;
    for (const auto& piece : pieces_) {
      const std::size_t before = planes_.size();
      for (std::size_t plane = 0; plane < half; ++plane) {
        bool here = false;
        for (const std::size_t row : {plane, plane + half})
          for (std::size_t i = piece.column; i < piece.column + piece.width; ++i) here |= transform[row * dim_ + i] != 0;
        if (here) planes_.push_back(plane);
      }
      if (2 * (planes_.size() - before) != piece.width) return false;
    }
    return planes_.size() == half;
  }

  // Row i of A⁻¹ in the order (first, second) of each plane.
  float inverse_at(std::size_t i, std::size_t column) const {
    const std::size_t plane = planes_[column / 2];
    return quantizer_.inverse()[i * dim_ + plane + column % 2 * (dim_ / 2)];
  }

  // Tables of a piece times its block of A⁻¹, μ in the first.
  void fold() {
    for (const auto& piece : pieces_) {
      LookupPiece folded = piece;
      for (std::size_t stage = 0; stage < 2 && piece.tables[stage]; ++stage) {
        auto& table = folded_tables_.emplace_back(256 * piece.width + kLookupPadding);
        for (std::size_t code = 0; code < 256; ++code)
          for (std::size_t j = 0; j < piece.width; ++j) {
            const std::size_t column = piece.column + j, plane = planes_[column / 2];
            double sum = stage == 0 ? quantizer_.mean()[plane + column % 2 * (dim_ / 2)] : 0.0f;
            for (std::size_t i = 0; i < piece.width; ++i)
              sum += static_cast<double>(piece.tables[stage][code * piece.width + i]) * inverse_at(piece.column + i, column);
            table[code * piece.width + j] = static_cast<float>(sum);
          }
        folded.tables[stage] = table.data();
      }
      folded_.push_back(folded);
    }
  }

  void patch_keys(const std::uint8_t* block, std::size_t begin, std::size_t tokens, std::size_t held, float* k) const {
    const std::uint8_t* bytes = block + codes_.block_bytes();
    for (std::size_t p = 0; p < held_patches(held); ++p, bytes += quantizer_.patch_bytes()) {
      if (bytes[0] < begin || bytes[0] >= begin + tokens) continue;
      std::vector<float> rest(dim_);
      quantizer_.add_patch(bytes, rest.data());
      float* key = k + (bytes[0] - begin) * stride_;
      for (const auto& piece : pieces_)
        for (std::size_t column = piece.column; column < piece.column + piece.width; ++column)
          for (std::size_t i = piece.column; i < piece.column + piece.width; ++i) key[column] += rest[i] * inverse_at(i, column);
    }
  }

  // Queries in the order of the planes, turned back by `position`: exact at the begin of a block, in steps from there.
  void turn_back(const BlockQueries& queries, std::size_t position, std::vector<float>& out) const {
    thread_local std::vector<float> cosines, sines;
    cosines.clear(), sines.clear();
    append_angles(position, cosines, sines);
    for (float& sine : sines) sine = -sine;
    out.resize(queries.num_queries * dim_);
    for (std::size_t r = 0; r < queries.num_queries; ++r) {
      float* of = out.data() + r * dim_;
      for (std::size_t i = 0; i < dim_ / 2; ++i) {
        of[2 * i] = queries.q[r * dim_ + planes_[i]];
        of[2 * i + 1] = queries.q[r * dim_ + planes_[i] + dim_ / 2];
      }
      turn_pairs(of, 1, dim_, dim_, cosines.data(), sines.data());
    }
  }

  std::vector<std::size_t> planes_;
  std::vector<LookupPiece> folded_;
  std::vector<std::vector<float>> folded_tables_;
  std::vector<float> cosines_, sines_;            // [kTurned, dim]
  std::vector<float> step_cosines_, step_sines_;  // [dim]: back by kTurned positions
};

}  // namespace

void BlockCodec::score(const std::uint8_t* block, std::size_t tokens, std::size_t position, const BlockQueries& queries,
                       float* scores, std::size_t score_stride) const {
  std::vector<float> keys(tokens * dim_);
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
  std::vector<float> values(tokens * dim_);
  decode(block, tokens, values.data());
  add_vectors(weights, num_queries, weight_stride, values.data(), tokens, dim_, dim_, sums);
}

void BlockCodec::finish(std::span<float>, std::span<const float>) const {}

void check_packable(const QuantizerParameters& parameters) {
  if (parameters.method == rotated_pq_method().name) return;
  if (const int group = make_quantizer(parameters)->token_group(); group != 1)
    throw_invalid("packed cache", "{} groups {} tokens: expected a method that stores tokens one by one", parameters.method, group);
}

std::shared_ptr<const BlockCodec> make_block_codec(const QuantizerParameters& parameters, const Rope* rope) {
  const bool keys = parameters.side == Side::kKeys;
  if (parameters.method == rotated_pq_method().name) {
    if (keys && parameters.numbers.at("plane") == 1)
      if (auto codec = PlaneKeysCodec::make(parameters, *rope)) return codec;
    return std::make_shared<RotatedPqCodec>(parameters, keys ? rope : nullptr);
  }
  check_packable(parameters);
  return std::make_shared<PlainCodec>(make_quantizer(parameters), nullptr);
}

}  // namespace veloxquant
