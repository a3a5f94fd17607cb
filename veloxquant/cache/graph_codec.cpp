#include "veloxquant/cache/graph_codec.h"

#include <algorithm>
#include <mutex>

#include "mlx/ops.h"
#include "veloxquant/cache/block_codec.h"

namespace veloxquant {
namespace {

constexpr int kBlock = static_cast<int>(kPackedBlockTokens);
constexpr int kLoad = 16;  // bytes

mx::array filled_up(const mx::array& x, int axis, int length) {
  if (x.shape(axis) == length) return x;
  return mx::pad(x, {axis}, {0}, {length - x.shape(axis)}, mx::array(0, x.dtype()));
}

// The place in its block, and what is left of the token.
std::vector<BitField> placed_patch_layout(int dim) {
  auto layout = patch_layout(dim);
  layout.insert(layout.begin(), {1, 8});
  return layout;
}

// Bytes [..., n], those of `from` [1, n] one after another.
mx::array reordered(const mx::array& bytes, const std::optional<mx::array>& from) {
  if (!from) return bytes;
  return mx::reshape(mx::take_along_axis(mx::reshape(bytes, {-1, bytes.shape(-1)}), *from, -1), bytes.shape());
}

}  // namespace

// Made when it is first asked for: kernels of ours need no graph, and quantizers take milliseconds.
struct GraphCodec::Graph {
  QuantizerParameters parameters;
  std::once_flag made;
  MethodGraph graph;
};

const MethodGraph& GraphCodec::graph() const {
  std::call_once(graph_->made, [&] {
    graph_->graph = method_graph(graph_->parameters, make_quantizer(graph_->parameters));
    graph_->parameters = {};
  });
  return graph_->graph;
}

mx::array GraphCodec::back(const mx::array& sums, const mx::array& totals) const {
  return graph().back(sums, totals);
}

GraphCodec::GraphCodec(const QuantizerParameters& parameters) : graph_(std::make_shared<Graph>()), dim_(parameters.dim) {
  const auto shape = block_shape(parameters);
  graph_->parameters = parameters;
  token_bytes_ = static_cast<int>(shape.token_bytes());
  patches_ = static_cast<int>(shape.patches);
  filled_bytes_ = static_cast<int>(shape.bytes);
  block_bytes_ = (filled_bytes_ + kLoad - 1) / kLoad * kLoad;
  if (shape.order == TokenOrder::kPlain) return;
  std::vector<int> places, tokens(shape.patches_at);
  for (std::size_t token = 0; token < kPackedBlockTokens; ++token)
    for (std::size_t byte = 0; byte < shape.token_bytes(); ++byte) {
      tokens[shape.place(byte, token)] = static_cast<int>(places.size());
      places.push_back(static_cast<int>(shape.place(byte, token)));
    }
  const int size = static_cast<int>(shape.patches_at);
  place_of_byte_ = mx::array(places.begin(), {1, size});
  byte_at_place_ = mx::array(tokens.begin(), {1, size});
}

mx::array GraphCodec::as_block(const mx::array& tokens) const {
  return reordered(mx::flatten(tokens, -2, -1), byte_at_place_);
}

mx::array GraphCodec::tokens_of(const mx::array& blocks) const {
  const auto bytes = part(blocks, -1, 0, kBlock * token_bytes_);
  return mx::unflatten(reordered(bytes, place_of_byte_), -1, {kBlock, token_bytes_});
}

// [..., block_bytes] → [..., patches, bytes of one].
mx::array GraphCodec::patches_of(const mx::array& blocks) const {
  return mx::unflatten(part(blocks, -1, kBlock * token_bytes_, filled_bytes_), -1, {patches_, -1});
}

GraphCodec::Blocks GraphCodec::append(const Blocks& blocks, int at, const mx::array& vectors) const {
  const auto z = graph().forward(vectors);
  const auto fields = graph().quantise(z);
  auto tokens = pack_fields(fields, graph().layout);
  if (at > 0) tokens = mx::concatenate({part(tokens_of(blocks.bytes), -2, 0, at), tokens}, -2);
  Blocks grown{as_block(filled_up(tokens, -2, kBlock)), mx::zeros({vectors.shape(0), patches_})};
  if (patches_ > 0) {
    const auto patched = offer_patches(blocks, at, mx::subtract(z, graph().look_up(fields)));
    grown = {mx::concatenate({grown.bytes, patched.bytes}, -1), patched.errors};
  }
  return {filled_up(grown.bytes, -1, block_bytes_), grown.errors};
}

// Of the tokens that have patches and those of which `rest` [rows, n, dim] is left, the ones that lose most: bytes [rows, those of
// all patches], and what is lost.
GraphCodec::Blocks GraphCodec::offer_patches(const Blocks& blocks, int at, const mx::array& rest) const {
  const int rows = rest.shape(0), count = rest.shape(1), held = std::min(patches_, at), kept = std::min(patches_, at + count);
  const auto places = mx::broadcast_to(mx::reshape(mx::arange(at, at + count), {count, 1}), {rows, count, 1});
  auto fields = quantise_patch(rest);
  fields.insert(fields.begin(), places);
  auto bytes = pack_fields(fields, placed_patch_layout(dim_)), errors = mx::sum(mx::square(rest), -1);
  if (held > 0) {
    bytes = mx::concatenate({part(patches_of(blocks.bytes), -2, 0, held), bytes}, -2);
    errors = mx::concatenate({part(blocks.errors, -1, 0, held), errors}, -1);
  }
  if (kept < held + count) {
    // Candidates are in the order of their places, and so are those that stay.
    const auto index = mx::arange(held + count);
    const auto order = mx::argsort(mx::where(largest(errors, kept), index, mx::add(index, mx::array(held + count))), -1);
    const auto stay = part(order, -1, 0, kept);
    bytes = mx::take_along_axis(bytes, mx::expand_dims(stay, -1), -2);
    errors = mx::take_along_axis(errors, stay, -1);
  }
  return {mx::flatten(filled_up(bytes, -2, patches_), -2, -1), filled_up(errors, -1, patches_)};
}

GraphCodec::Blocks GraphCodec::trim(const mx::array& bytes, const std::optional<mx::array>& errors, int held, int tokens) const {
  if (patches_ == 0) return {bytes, mx::zeros({bytes.shape(0), 0})};
  const int count = std::min(patches_, held), kept = std::min(patches_, tokens);
  const auto patches = part(patches_of(bytes), -2, 0, count), index = mx::arange(count);
  const auto stays = mx::less(part(patches, -1, 0, 1), mx::array(tokens)), one = mx::squeeze(stays, -1);
  auto fields = unpack_fields(patches, placed_patch_layout(dim_));
  fields.erase(fields.begin());
  const auto lost = errors ? part(*errors, -1, 0, count) : mx::sum(mx::square(look_up_patch(fields)), -1);
  // Those that go come first, as zeros, and any other displaces them.
  const auto order = part(mx::argsort(mx::where(one, mx::add(index, mx::array(count)), index), -1), -1, count - kept, count);
  const auto bytes_kept = mx::take_along_axis(mx::where(stays, patches, mx::zeros_like(patches)), mx::expand_dims(order, -1), -2),
             lost_kept = mx::take_along_axis(mx::where(one, lost, mx::zeros_like(lost)), order, -1);
  const auto tail = mx::flatten(filled_up(bytes_kept, -2, patches_), -2, -1);
  return {filled_up(mx::concatenate({part(bytes, -1, 0, kBlock * token_bytes_), tail}, -1), -1, block_bytes_),
          filled_up(lost_kept, -1, patches_)};
}

mx::array GraphCodec::look_up(const mx::array& blocks, int tokens) const {
  const auto bytes = part(mx::flatten(tokens_of(blocks), 1, 2), -2, 0, tokens);
  const auto z = graph().look_up(unpack_fields(bytes, graph().layout));
  if (patches_ == 0) return z;
  auto fields = unpack_fields(patches_of(blocks), placed_patch_layout(dim_));
  const auto places = mx::swapaxes(fields[0], -1, -2);  // [rows, blocks, 1, patches]
  fields.erase(fields.begin());
  // A product with ones where a patch has its token: no two have the same one, and the bytes of none, zeros, add nothing.
  const auto own = mx::equal(mx::reshape(mx::arange(kBlock), {kBlock, 1}), places);
  const auto rests = mx::matmul(mx::astype(own, mx::float32), look_up_patch(fields));
  return mx::add(z, part(mx::flatten(rests, 1, 2), -2, 0, tokens));
}

}  // namespace veloxquant
