#include "veloxquant/cache/vecinfer_codec.h"

#include <algorithm>

#include "veloxquant/quantize/vecinfer.h"

namespace veloxquant {
namespace {

// Codes of 8 bits are a byte each, of 4 bits two, the even one low.
class VecInferCodec : public BlockCodec {
 public:
  explicit VecInferCodec(const QuantizerParameters& parameters)
      : BlockCodec(parameters, nullptr),
        quantizer_(static_cast<const VecInferQuantizer*>(make_quantizer(parameters).release())),
        subspaces_(static_cast<std::size_t>(quantizer_->codebook().num_subspaces())),
        centroids_(static_cast<std::size_t>(quantizer_->codebook().num_centroids())),
        token_bytes_(shape_.token_bytes()) {}

  void append(std::span<const float> vectors, std::size_t at, std::uint8_t* block, OpenBlock&) const override {
    std::vector<std::uint8_t> encoded(vectors.size() / dim_ * token_bytes_);
    quantizer_->encode(vectors, encoded);
    for (std::size_t i = 0; i < encoded.size(); ++i) block[shape_.place(i % token_bytes_, at + i / token_bytes_)] = encoded[i];
  }

  void decode(const std::uint8_t* block, std::size_t tokens, float* vectors) const override {
    std::vector<std::uint8_t> encoded(tokens * token_bytes_);
    for (std::size_t i = 0; i < encoded.size(); ++i) encoded[i] = block[shape_.place(i % token_bytes_, i / token_bytes_)];
    quantizer_->decode(encoded, {vectors, tokens * dim_});
  }

 protected:
  std::unique_ptr<const VecInferQuantizer> quantizer_;
  std::size_t subspaces_, centroids_, token_bytes_;
};

class VecInferKeysCodec : public VecInferCodec {
 public:
  using VecInferCodec::VecInferCodec;

  void prepare(const BlockQueries& queries, PreparedQueries& prepared) const override {
    prepared.tables.clear();
    const auto& [q, num_queries, scale] = queries;
    if (num_queries >= kManyQueries) return;
    std::vector<float> rows(q, q + num_queries * dim_), products(num_queries * subspaces_ * centroids_);
    transform_queries(rows, quantizer_->smooth_factors());
    quantizer_->codebook().query_tables(rows, products);
    prepared.tables.resize(num_queries);
    for (std::size_t r = 0; r < num_queries; ++r)
      make_scan_tables(&products[r * subspaces_ * centroids_], subspaces_, centroids_, prepared.tables[r]);
  }

  void score(const CodedBlock& block, std::size_t position, const BlockQueries& queries, const PreparedQueries& prepared,
             float* scores, std::size_t score_stride) const override {
    if (prepared.tables.empty()) return BlockCodec::score(block, position, queries, prepared, scores, score_stride);
    const auto scan = centroids_ == 256 ? scan_bytes : scan_nibbles;
    for (std::size_t r = 0; r < prepared.tables.size(); ++r)
      scan(prepared.tables[r], {block.bytes, block.tokens, kPackedBlockTokens}, queries.scale, scores + r * score_stride);
  }
};

class VecInferValuesCodec : public VecInferCodec {
 public:
  explicit VecInferValuesCodec(const QuantizerParameters& parameters) : VecInferCodec(parameters), codes_{token_bytes_} {
    const std::size_t width = dim_ / subspaces_, codes_of_byte = centroids_ == 256 ? 1 : 2;
    tables_.reserve(token_bytes_);
    for (std::size_t byte = 0, code = 0; byte < token_bytes_; ++byte, code += codes_of_byte) {
      const std::size_t codes = std::min(codes_of_byte, subspaces_ - code);
      auto& table = tables_.emplace_back();
      for (std::size_t value = 0; value < 256; ++value)
        for (std::size_t c = 0; c < codes; ++c) {
          const std::size_t centroid = codes_of_byte == 1 ? value : value >> (4 * c) & 15;
          const auto entry = quantizer_->codebook().entries().subspan(((code + c) * centroids_ + centroid) * width, width);
          table.insert(table.end(), entry.begin(), entry.end());
        }
      table.resize(table.size() + kLookupPadding);
      pieces_.push_back({code * width, codes * width, {codes_.place(byte), {}}, {table.data(), nullptr}});
    }
  }

  void add(const CodedBlock& block, const float* weights, std::size_t num_queries, std::size_t weight_stride,
           float* sums) const override {
    const std::size_t tokens = block.tokens, stride = dim_ + kLookupPadding, tile_bytes = codes_.tile_bytes();
    thread_local std::vector<float> rows;
    rows.resize(tokens * stride + kLookupPadding);
    for (std::size_t t = 0; t < tokens; t += kPackedTileTokens)
      sum_entries(block.bytes + t / kPackedTileTokens * tile_bytes, std::min(kPackedTileTokens, tokens - t), pieces_,
                  rows.data() + t * stride, stride);
    add_vectors(weights, num_queries, weight_stride, rows.data(), tokens, stride, dim_, sums);
  }

 private:
  PackedCodes codes_;
  std::vector<std::vector<float>> tables_;
  std::vector<LookupPiece> pieces_;
};

}  // namespace

bool has_vecinfer_codec(const QuantizerParameters& parameters) {
  if (parameters.method != vecinfer_method().name) return false;
  const auto centroids = parameters.numbers.at("num_centroids"), subspaces = parameters.numbers.at("num_subspaces");
  return (centroids == 256 || centroids == 16) && static_cast<std::size_t>(subspaces) <= kMaxScanCodes;
}

std::shared_ptr<const BlockCodec> make_vecinfer_codec(const QuantizerParameters& parameters) {
  if (parameters.side == Side::kKeys) return std::make_shared<VecInferKeysCodec>(parameters);
  return std::make_shared<VecInferValuesCodec>(parameters);
}

}  // namespace veloxquant
