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

void PackedSide::encode(const BlockCodec& codec, std::span<const float> vectors, std::size_t index, PackedBlocks& blocks) {
  const auto dim = static_cast<std::size_t>(shape.dim);
  for (std::size_t done = 0, tokens = vectors.size() / dim; done < tokens;) {
    const std::size_t at = (index + done) % kPackedBlockTokens, count = std::min(kPackedBlockTokens - at, tokens - done);
    codec.append(vectors.subspan(done * dim, count * dim), at, blocks[(index + done) / kPackedBlockTokens].data() + begin, open);
    done += count;
  }
}

void PackedSide::trim(std::size_t held, std::size_t tokens, bool closed, std::vector<std::uint8_t>& block) {
  if (closed) open = {};
  trim_block(shape, held, tokens, block.data() + begin, open);
}

std::size_t PackedSequence::nbytes() const {
  std::size_t bytes = 0;
  for (const auto& block : blocks) bytes += block.size();
  for (const auto& [keys, values] : heads) bytes += keys.exact.nbytes() + values.exact.nbytes();
  return bytes;
}

void PackedSequence::make_room(std::size_t coded) {
  while (blocks.size() < blocks_of(coded)) blocks.emplace_back(heads.back().values.end());
}

void PackedSequence::keep_coded(std::size_t kept) {
  if (kept == coded) return;
  const bool closed = blocks_of(kept) < blocks.size();
  const std::size_t held = closed ? kPackedBlockTokens : tokens_in_last_block(coded);
  blocks.resize(blocks_of(kept));
  for (auto& [keys, values] : heads)
    for (auto* side : {&keys, &values}) {
      if (kept > 0)
        side->trim(held, tokens_in_last_block(kept), closed, blocks.back());
      else if (closed)
        side->open = {};
    }
  coded = kept;
}

}  // namespace veloxquant
