// A pair of arrays that grow along the token axis.
#pragma once

#include <cstddef>
#include <optional>
#include <utility>

#include "mlx/array.h"
#include "veloxquant/model/device.h"

namespace veloxquant {

/// Keys and values [B, H, tokens, D].  Memory grows in steps, so that appending one token does not copy the others.
class TokenStore {
 public:
  /// Appends k and v [B, H, T, D]; returns all tokens so far.  What an earlier call returned must be gone by then, or the whole
  /// store is copied.
  std::pair<mx::array, mx::array> append(const mx::array& k, const mx::array& v);

  /// Keys and values of all tokens; none before the first.
  std::optional<std::pair<mx::array, mx::array>> tokens() const;

  /// Forgets all but the first `tokens`.
  void keep(int tokens) { size_ = tokens; }

  /// Tokens held.
  int size() const { return size_; }

  /// Bytes allocated.
  std::size_t nbytes() const;

 private:
  static constexpr int kStep = 256;

  void reserve(std::optional<mx::array>& side, const mx::array& like, int tokens) const;

  std::optional<mx::array> keys_, values_;
  int size_ = 0;
};

}  // namespace veloxquant
