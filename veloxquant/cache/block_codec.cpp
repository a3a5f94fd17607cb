#include "veloxquant/cache/block_codec.h"

#include <algorithm>
#include <cmath>
#include <numeric>

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
  RotatedPqCodec(const QuantizerParameters& parameters, const Rope* rope)
      : BlockCodec(parameters, rope),
        quantizer_(parameters),
        codes_{shape_.patches_at / kPackedBlockTokens},
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
      std::uint8_t* tile = block + (at + t) / kPackedTileTokens * codes_.tile_bytes();
      for (std::size_t code = 0; code < count; ++code) {
        const auto [offset, stride] = codes_.place(code);
        tile[offset + (at + t) % kPackedTileTokens * stride] = codes[t * count + code];
      }
      if (patches_ > 0) offer_patch(std::span(rest).subspan(t * dim_, dim_), at + t, block + codes_.block_bytes(), open);
    }
  }

  void decode(const std::uint8_t* block, std::size_t tokens, float* vectors) const override {
    float* z = scratch(tokens * stride_ + kLookupPadding);
    look_up(block, 0, tokens, z);
    patch(block, 0, tokens, tokens, z);
    const int d = static_cast<int>(dim_);
    for (std::size_t t = 0; t < tokens; ++t) std::copy(quantizer_.mean().begin(), quantizer_.mean().end(), vectors + t * dim_);
    gemm(false, false, static_cast<int>(tokens), d, d, 1.0f, z, static_cast<int>(stride_), quantizer_.inverse().data(), d, 1.0f,
         vectors, d);
  }

  void add(const std::uint8_t* block, std::size_t tokens, const float* weights, std::size_t num_queries, std::size_t weight_stride,
           float* sums) const override {
    // A tile's vectors stay in the first-level cache between look-up and sum; a product wants more.
    const std::size_t step = num_queries < kManyQueries ? kPackedTileTokens : kPackedBlockTokens;
    float* z = scratch(step * stride_ + kLookupPadding);
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
    for (std::size_t p = 0; p < held_patches(held); ++p, bytes += shape_.patch_bytes)
      if (bytes[0] >= begin && bytes[0] < begin + tokens)
        RotatedPqQuantizer::add_patch(bytes, {z + (bytes[0] - begin) * stride_, dim_});
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

// Keys of rotated_pq, and few queries: keys come in an order in which the two dimensions of a plane are neighbours, and are turned
// on the way to their scores.  Where sub-spaces hold whole planes, A⁻¹ and μ are in the tables; else a product with A⁻¹ follows.
class RotatedKeysCodec : public RotatedPqCodec {
 public:
  RotatedKeysCodec(const QuantizerParameters& parameters, const Rope& rope) : RotatedPqCodec(parameters, &rope) {
    const std::size_t turned = rope.frequencies().size();
    if (2 * turned == dim_ && parameters.numbers.at("plane") == 1 && find_planes()) {
      set_order();
      fold();
    } else {
      planes_.resize(turned);
      std::iota(planes_.begin(), planes_.end(), std::size_t{0});
      set_order();
    }
    for (std::size_t i = 0; i < dim_; ++i)
      for (std::size_t j = 0; j < dim_; ++j) inverse_.push_back(quantizer_.inverse()[i * dim_ + order_[j]]);
    for (const std::size_t i : order_) mean_.push_back(quantizer_.mean()[i]);
    for (std::size_t t = 0; t < kTurned; ++t) append_angles(t, rope.magnitude(), cosines_, sines_);
    append_angles(kTurned, 1.0f, step_cosines_, step_sines_);
    for (float& sine : step_sines_) sine = -sine;  // queries turn back
  }

  void score(const std::uint8_t* block, std::size_t tokens, std::size_t position, const BlockQueries& queries, float* scores,
             std::size_t score_stride) const override {
    if (queries.num_queries >= kManyQueries) return BlockCodec::score(block, tokens, position, queries, scores, score_stride);
    thread_local std::vector<float> q, keys;
    turn_back(queries, position, q);
    // A tile stays in the first-level cache; a product wants more.
    const std::size_t step = folded_.empty() ? kPackedBlockTokens : kPackedTileTokens;
    keys.resize(step * stride_ + kLookupPadding);
    for (std::size_t begin = 0; begin < tokens; begin += step) {
      const std::size_t some = std::min(step, tokens - begin);
      decode_in_order(block, begin, some, tokens, keys.data());
      // Keys turn by their place in a stretch, queries back by where that begins.
      for (std::size_t t = 0; t < some; t += kTurned) {
        score_turned_rows(q.data(), queries.num_queries, keys.data() + t * stride_, std::min(kTurned, some - t), stride_, dim_,
                          cosines_.data(), sines_.data(), queries.scale, scores + begin + t, score_stride);
        for (std::size_t r = 0; r < queries.num_queries; ++r)
          turn_pairs(q.data() + r * dim_, 1, dim_, dim_, step_cosines_.data(), step_sines_.data());
      }
    }
  }

 private:
  static constexpr std::size_t kTurned = 8;

  // The planes of the sub-spaces, in their order: plane i is dimensions i and i + dim/2.
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

  // Both dimensions of each plane, then those that do not turn.
  void set_order() {
    for (const std::size_t plane : planes_) order_.insert(order_.end(), {plane, plane + planes_.size()});
    for (std::size_t i = order_.size(); i < dim_; ++i) order_.push_back(i);
  }

  // Cosines and sines of a position, as turn_pairs takes them.
  void append_angles(std::size_t position, float magnitude, std::vector<float>& cosines, std::vector<float>& sines) const {
    for (const std::size_t plane : planes_) {
      const double angle = static_cast<double>(position) * rope_->frequencies()[plane];
      const auto c = magnitude * static_cast<float>(std::cos(angle)), s = magnitude * static_cast<float>(std::sin(angle));
      cosines.insert(cosines.end(), {c, c});
      sines.insert(sines.end(), {-s, s});
    }
    cosines.insert(cosines.end(), dim_ - 2 * planes_.size(), 1.0f);
    sines.insert(sines.end(), dim_ - 2 * planes_.size(), 0.0f);
  }

  // Tables of a piece times its block of A⁻¹, μ in the first.
  void fold() {
    for (const auto& piece : pieces_) {
      LookupPiece folded = piece;
      for (std::size_t stage = 0; stage < 2 && piece.tables[stage]; ++stage) {
        auto& table = folded_tables_.emplace_back(256 * piece.width + kLookupPadding);
        for (std::size_t code = 0; code < 256; ++code)
          for (std::size_t j = 0; j < piece.width; ++j) {
            const std::size_t to = order_[piece.column + j];
            double sum = stage == 0 ? quantizer_.mean()[to] : 0.0f;
            for (std::size_t i = 0; i < piece.width; ++i)
              sum += static_cast<double>(piece.tables[stage][code * piece.width + i]) *
                     quantizer_.inverse()[(piece.column + i) * dim_ + to];
            table[code * piece.width + j] = static_cast<float>(sum);
          }
        folded.tables[stage] = table.data();
      }
      folded_.push_back(folded);
    }
  }

  // Keys begin … begin + tokens − 1 of a block that holds `held`, not turned, stride_ apart.
  void decode_in_order(const std::uint8_t* block, std::size_t begin, std::size_t tokens, std::size_t held, float* keys) const {
    const int n = static_cast<int>(tokens), d = static_cast<int>(dim_), stride = static_cast<int>(stride_);
    if (folded_.empty()) {
      float* z = scratch(tokens * stride_ + kLookupPadding);
      look_up(block, begin, tokens, z);
      patch(block, begin, tokens, held, z);
      for (std::size_t t = 0; t < tokens; ++t) std::copy(mean_.begin(), mean_.end(), keys + t * stride_);
      return gemm(false, false, n, d, d, 1.0f, z, stride, inverse_.data(), d, 1.0f, keys, stride);
    }
    sum_entries(block + begin / kPackedTileTokens * codes_.tile_bytes(), tokens, folded_, keys, stride_);
    const std::uint8_t* bytes = block + codes_.block_bytes();
    for (std::size_t p = 0; p < held_patches(held); ++p, bytes += shape_.patch_bytes) {
      if (bytes[0] < begin || bytes[0] >= begin + tokens) continue;
      std::vector<float> rest(dim_);
      RotatedPqQuantizer::add_patch(bytes, rest);
      gemm(false, false, 1, d, d, 1.0f, rest.data(), d, inverse_.data(), d, 1.0f, keys + (bytes[0] - begin) * stride_, d);
    }
  }

  // Queries in order_, turned back by `position`: exact at the begin of a block, in steps from there.
  void turn_back(const BlockQueries& queries, std::size_t position, std::vector<float>& out) const {
    thread_local std::vector<float> cosines, sines;
    cosines.clear(), sines.clear();
    append_angles(position, 1.0f, cosines, sines);
    for (float& sine : sines) sine = -sine;
    out.resize(queries.num_queries * dim_);
    for (std::size_t r = 0; r < queries.num_queries; ++r) {
      for (std::size_t i = 0; i < dim_; ++i) out[r * dim_ + i] = queries.q[r * dim_ + order_[i]];
      turn_pairs(out.data() + r * dim_, 1, dim_, dim_, cosines.data(), sines.data());
    }
  }

  std::vector<std::size_t> planes_, order_;  // planes that turn; the dimension that stands at each place of a key
  std::vector<float> inverse_, mean_;        // of the quantizer, in order_
  std::vector<LookupPiece> folded_;          // none: keys are a product with inverse_
  std::vector<std::vector<float>> folded_tables_;
  std::vector<float> cosines_, sines_;            // [kTurned, dim]
  std::vector<float> step_cosines_, step_sines_;  // [dim]: back by kTurned positions
};

}  // namespace

void BlockCodec::score(const std::uint8_t* block, std::size_t tokens, std::size_t position, const BlockQueries& queries,
                       float* scores, std::size_t score_stride) const {
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
  BlockShape shape{.bytes = 0, .patches_at = 0, .patches = 0, .patch_bytes = 0, .dim = parameters.dim};
  if (parameters.method != rotated_pq_method().name) {
    check_packable(parameters);
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
    if (keys) return std::make_shared<RotatedKeysCodec>(parameters, *rope);
    return std::make_shared<RotatedPqCodec>(parameters, nullptr);
  }
  check_packable(parameters);
  return std::make_shared<PlainCodec>(parameters);
}

}  // namespace veloxquant
