#include "veloxquant/cache/vecinfer_codec.h"

#include <algorithm>

#include "veloxquant/cache/entry_layout.h"
#include "veloxquant/quantize/vecinfer.h"

namespace veloxquant {
namespace {

// Codes of 8 bits are a byte each, of 4 bits two, the even one low.
class VecInferCodec : public BlockCodec {
 public:
  explicit VecInferCodec(std::unique_ptr<const VecInferQuantizer> quantizer)
      : BlockCodec(quantizer->dim(), nullptr),
        quantizer_(std::move(quantizer)),
        subspaces_(static_cast<std::size_t>(quantizer_->codebook().num_subspaces())),
        centroids_(static_cast<std::size_t>(quantizer_->codebook().num_centroids())),
        codes_of_byte_(centroids_ == 256 ? 1 : 2),
        token_bytes_(quantizer_->encoded_bytes(1)) {}

  std::size_t block_bytes() const override { return token_bytes_ * kPackedBlockTokens; }

  void append(std::span<const float> vectors, std::size_t at, std::uint8_t* block, OpenBlock&) const override {
    std::vector<std::uint8_t> encoded(vectors.size() / dim_ * token_bytes_);
    quantizer_->encode(vectors, encoded);
    for (std::size_t i = 0; i < encoded.size(); ++i) block[place(i % token_bytes_, at + i / token_bytes_)] = encoded[i];
  }

  void decode(const std::uint8_t* block, std::size_t tokens, float* vectors) const override {
    std::vector<std::uint8_t> encoded(tokens * token_bytes_);
    for (std::size_t i = 0; i < encoded.size(); ++i) encoded[i] = block[place(i % token_bytes_, i / token_bytes_)];
    quantizer_->decode(encoded, {vectors, tokens * dim_});
  }

 protected:
  // Of a byte of a token, in a block.
  virtual std::size_t place(std::size_t byte, std::size_t token) const = 0;

  std::unique_ptr<const VecInferQuantizer> quantizer_;
  std::size_t subspaces_, centroids_, codes_of_byte_, token_bytes_;
};

class VecInferKeysCodec : public VecInferCodec {
 public:
  using VecInferCodec::VecInferCodec;

  void prepare(PreparedQueries& prepared) const override {
    const auto& [q, num_queries, scale] = prepared.queries;
    if (num_queries >= kManyQueries) return;
    std::vector<float> rows(q, q + num_queries * dim_), products(num_queries * subspaces_ * centroids_);
    transform_queries(rows, quantizer_->smooth_factors());
    quantizer_->codebook().query_tables(rows, products);
    prepared.tables.resize(num_queries);
    for (std::size_t r = 0; r < num_queries; ++r)
      make_scan_tables(&products[r * subspaces_ * centroids_], subspaces_, centroids_, prepared.tables[r]);
  }

  void score(const std::uint8_t* block, std::size_t tokens, std::size_t position, const PreparedQueries& prepared, float* scores,
             std::size_t score_stride) const override {
    if (prepared.tables.empty()) return BlockCodec::score(block, tokens, position, prepared, scores, score_stride);
    const auto scan = centroids_ == 256 ? scan_bytes : scan_nibbles;
    for (std::size_t r = 0; r < prepared.tables.size(); ++r)
      scan(prepared.tables[r], {block, tokens, kPackedBlockTokens}, prepared.queries.scale, scores + r * score_stride);
  }

 private:
  std::size_t place(std::size_t byte, std::size_t token) const override { return byte * kPackedBlockTokens + scan_place(token); }
};

class VecInferValuesCodec : public VecInferCodec {
 public:
  explicit VecInferValuesCodec(std::unique_ptr<const VecInferQuantizer> quantizer) : VecInferCodec(std::move(quantizer)) {
    const std::size_t width = dim_ / subspaces_;
    std::vector<LookupPiece> pieces;
    std::vector<std::vector<float>> tables;
    for (std::size_t byte = 0, code = 0; byte < token_bytes_; ++byte, code += codes_of_byte_) {
      const std::size_t codes = std::min(codes_of_byte_, subspaces_ - code);
      auto& table = tables.emplace_back();
      for (std::size_t value = 0; value < 256; ++value)
        for (std::size_t c = 0; c < codes; ++c) {
          const std::size_t centroid = codes_of_byte_ == 1 ? value : value >> (4 * c) & 15;
          const auto entry = quantizer_->codebook().entries().subspan(((code + c) * centroids_ + centroid) * width, width);
          table.insert(table.end(), entry.begin(), entry.end());
        }
      pieces.push_back({code * width, codes * width, {codes_.place(byte), {}}, {table.data(), nullptr}});
    }
    entries_ = EntryLayout(pieces);
  }

  void add(const std::uint8_t* block, std::size_t tokens, const float* weights, std::size_t num_queries, std::size_t weight_stride,
           float* sums) const override {
    if (num_queries >= kManyQueries) return BlockCodec::add(block, tokens, weights, num_queries, weight_stride, sums);
    entries_.add({block, codes_.tile_bytes(), kPackedTileTokens, tokens}, weights, num_queries, weight_stride, sums);
  }

 private:
  std::size_t place(std::size_t byte, std::size_t token) const override {
    const auto [offset, stride] = codes_.place(byte);
    return token / kPackedTileTokens * codes_.tile_bytes() + offset + token % kPackedTileTokens * stride;
  }

  PackedCodes codes_{token_bytes_};
  EntryLayout entries_;
};

}  // namespace

std::shared_ptr<const BlockCodec> make_vecinfer_codec(const QuantizerParameters& parameters) {
  if (parameters.method != vecinfer_method().name) return nullptr;
  const double centroids = parameters.numbers.at("num_centroids");
  if (centroids != 256 && centroids != 16) return nullptr;
  auto quantizer =
      std::unique_ptr<const VecInferQuantizer>(static_cast<const VecInferQuantizer*>(make_quantizer(parameters).release()));
  if (static_cast<std::size_t>(quantizer->codebook().num_subspaces()) > kMaxScanCodes) return nullptr;
  if (parameters.side == Side::kKeys) return std::make_shared<VecInferKeysCodec>(std::move(quantizer));
  return std::make_shared<VecInferValuesCodec>(std::move(quantizer));
}

}  // namespace veloxquant
