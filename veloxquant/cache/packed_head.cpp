#include "veloxquant/cache/packed_head.h"

#include <algorithm>

namespace veloxquant {

ExactStore::ExactStore(const Quantizer& quantizer, std::size_t window, std::size_t sinks)
    : quantizer_(&quantizer), bytes_(quantizer.encoded_bytes(1)), window_(window), sinks_(sinks * bytes_), ring_(window * bytes_) {}

void ExactStore::append(const std::uint8_t* encoded, std::size_t first, std::size_t tokens) {
  for (std::size_t t = 0; t < tokens; ++t, encoded += bytes_) {
    const std::size_t position = first + t;
    if (position * bytes_ < sinks_.size()) {
      std::copy_n(encoded, bytes_, sinks_.data() + position * bytes_);
    } else if (window_ > 0) {
      std::copy_n(encoded, bytes_, ring_.data() + position % window_ * bytes_);
    }
  }
}

void ExactStore::read(std::size_t position, float* vector) const {
  const bool sink = position * bytes_ < sinks_.size();
  const std::uint8_t* from = sink ? sinks_.data() + position * bytes_ : ring_.data() + position % window_ * bytes_;
  quantizer_->decode({from, bytes_}, {vector, static_cast<std::size_t>(quantizer_->dim())});
}

void PackedSide::encode(const BlockCodec& codec, std::span<const float> vectors, std::size_t index) {
  const auto dim = static_cast<std::size_t>(shape.dim);
  for (std::size_t begin = 0, tokens = vectors.size() / dim; begin < tokens;) {
    const std::size_t at = (index + begin) % kPackedBlockTokens, count = std::min(kPackedBlockTokens - at, tokens - begin);
    if (at == 0) blocks.emplace_back(shape.bytes);
    codec.append(vectors.subspan(begin * dim, count * dim), at, blocks.back().data(), open);
    begin += count;
  }
}

void PackedSide::make_room(std::size_t coded) {
  blocks.assign(blocks_of(coded), std::vector<std::uint8_t>(shape.bytes));
  open.patch_errors.assign(std::min(shape.patches, tokens_in_last_block(coded)), 0.0f);
}

void PackedSide::trim(std::size_t coded, std::size_t kept) {
  if (kept == coded) return;
  const bool reopened = blocks_of(kept) < blocks.size();
  if (reopened) open = {};
  blocks.resize(blocks_of(kept));
  if (kept > 0)
    trim_block(shape, reopened ? kPackedBlockTokens : tokens_in_last_block(coded), tokens_in_last_block(kept), blocks.back().data(),
               open);
}

}  // namespace veloxquant
