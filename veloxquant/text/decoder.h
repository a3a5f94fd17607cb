// From the contents of tokens to the text that they stand for.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "veloxquant/core/json.h"

namespace veloxquant {

/// Turns the contents of tokens, in order, into pieces of valid UTF-8, which put together are the text.
using Decoder = std::function<std::vector<std::string>(std::vector<std::string> tokens)>;

/// Reads the `decoder` of a tokenizer.json: ByteLevel, ByteFallback, Fuse, Metaspace, Replace (Regex or String), Strip, and a
/// Sequence of them; null puts spaces between tokens.  Anything else is a std::runtime_error that names it and what is supported.
Decoder read_decoder(const nlohmann::json& json, const std::string& where);

}  // namespace veloxquant
