// Cutting text into the words that byte-pair encoding works on.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "veloxquant/core/json.h"
#include "veloxquant/text/stretch.h"

namespace veloxquant {

/// Turns words into more words; empty ones are dropped.
using PreTokenizer = std::function<std::vector<Stretch>(std::vector<Stretch> words)>;

/// Reads the `pre_tokenizer` of a tokenizer.json: null, Split (Regex or String, every behavior, invert), ByteLevel, Digits,
/// Metaspace, Punctuation, and a Sequence of them.  Anything else is a std::runtime_error that names it and what is supported.
PreTokenizer read_pre_tokenizer(const nlohmann::json& json, const std::string& where);

/// The settings of a Metaspace, which stands among pre-tokenizers and among decoders.
struct Metaspace {
  enum class Prepend { kAlways, kFirst, kNever };

  std::string replacement;  // of a space: one character
  Prepend prepend;
  bool split;
};
Metaspace read_metaspace(const JsonObject& json);

/// A field that holds one character, in UTF-8.
std::string read_character(const JsonObject& json, std::string_view field);

/// A byte as the printable character that byte-level tokenizers write it as, in UTF-8.
const std::string& byte_level_character(std::uint8_t byte);

/// The byte that such a character stands for, or −1.
int byte_level_byte(char32_t character);

}  // namespace veloxquant
