// What turns text into tokens.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace veloxquant {

/// A tokenizer as far as calibration needs one: `Tokenizer`, or one that somebody else brings.
class TextEncoder {
 public:
  virtual ~TextEncoder() = default;

  /// UTF-8 → tokens, with no special tokens around them.
  virtual std::vector<std::int32_t> encode(std::string_view text) const = 0;

  /// What it puts before a text where special tokens are asked for: a begin of text, for models that were trained with one; or none.
  virtual std::vector<std::int32_t> prefix() const { return {}; }
};

}  // namespace veloxquant
