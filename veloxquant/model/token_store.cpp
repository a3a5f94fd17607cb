#include "veloxquant/model/token_store.h"

#include "mlx/ops.h"

namespace veloxquant {
namespace {

mx::array first_tokens(const mx::array& x, int tokens) {
  return mx::slice(x, {0, 0, 0, 0}, {x.shape(0), x.shape(1), tokens, x.shape(3)});
}

}  // namespace

void TokenStore::reserve(std::optional<mx::array>& side, const mx::array& like, int tokens) const {
  if (side && side->shape(2) >= tokens) return;
  const int capacity = (tokens + kStep - 1) / kStep * kStep;
  const int held = side ? side->shape(2) : 0;
  const auto room = mx::zeros({like.shape(0), like.shape(1), capacity - held, like.shape(3)}, like.dtype());
  side = side ? mx::concatenate({*side, room}, 2) : room;
}

std::pair<mx::array, mx::array> TokenStore::append(const mx::array& k, const mx::array& v) {
  const int begin = size_, end = size_ + k.shape(2);
  const bool fits_exactly = begin == 0 && k.shape(2) > 1;  // a whole sequence in one go, as measuring does: nothing to grow
  size_ = end;
  if (fits_exactly) {
    // A part of a larger array would keep all of it.
    keys_ = mx::contiguous(k);
    values_ = mx::contiguous(v);
    return {*keys_, *values_};
  }
  reserve(keys_, k, end);
  reserve(values_, v, end);
  keys_ = mx::slice_update(*keys_, k, mx::Shape{0, 0, begin, 0}, mx::Shape{k.shape(0), k.shape(1), end, k.shape(3)});
  values_ = mx::slice_update(*values_, v, mx::Shape{0, 0, begin, 0}, mx::Shape{v.shape(0), v.shape(1), end, v.shape(3)});
  return {first_tokens(*keys_, end), first_tokens(*values_, end)};
}

std::optional<std::pair<mx::array, mx::array>> TokenStore::tokens() const {
  if (!keys_) return std::nullopt;
  return std::pair{first_tokens(*keys_, size_), first_tokens(*values_, size_)};
}

std::size_t TokenStore::nbytes() const {
  return keys_ ? keys_->nbytes() + values_->nbytes() : 0;
}

}  // namespace veloxquant
