// From the contents of tokens to the text that they stand for.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "veloxquant/core/json.h"

namespace veloxquant {

/// Where text goes token by token.  What the last sink of a decoder is given, put together, is valid UTF-8, and what it has been
/// given does not depend on what is still to come.
class TokenSink {
 public:
  virtual ~TokenSink() = default;

  /// More of the token that is open, whole characters; none is open at first and after an end.
  virtual void write(std::string_view part) = 0;

  virtual void end_token() = 0;

  /// No token is open, and none follows.
  virtual void finish() = 0;
};

/// Puts what decodes before `next`: contents of tokens go in, pieces of text come out, in time linear in both.
using Decoder = std::function<std::unique_ptr<TokenSink>(std::unique_ptr<TokenSink> next)>;

/// Reads the `decoder` of a tokenizer.json: ByteLevel, ByteFallback, Fuse, Metaspace, Replace (Regex or String), Strip, and a
/// Sequence of them; null puts spaces between tokens.  Anything else is a std::runtime_error that names it and what is supported.
Decoder read_decoder(const nlohmann::json& json, const std::string& where);

}  // namespace veloxquant
