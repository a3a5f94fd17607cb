// Arrays of heads that lie in memory in any order.
#pragma once

#include <cstddef>

namespace veloxquant {

/// Elements of an array [batch, heads, tokens, dim] whose last axis is contiguous; strides in elements.  Does not own the data.
template <class T>
struct Strided {
  T* data;
  std::ptrdiff_t batch_stride, head_stride, token_stride;

  T* at(std::size_t batch, std::size_t head, std::size_t token) const {
    return data + static_cast<std::ptrdiff_t>(batch) * batch_stride + static_cast<std::ptrdiff_t>(head) * head_stride +
           static_cast<std::ptrdiff_t>(token) * token_stride;
  }
};

using StridedView = Strided<const float>;
using MutableStridedView = Strided<float>;

}  // namespace veloxquant
