// Cutting text into the words that byte-pair encoding works on.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "veloxquant/core/json.h"

namespace veloxquant {

/// Turns words (valid UTF-8) into more words; empty ones are dropped.
using PreTokenizer = std::function<std::vector<std::string>(std::vector<std::string> words)>;

/// Reads the `pre_tokenizer` of a tokenizer.json: null, Split (Regex or String, every behavior, invert), ByteLevel, Digits, and a
/// Sequence of them.  Anything else is a std::runtime_error that names it and what is supported.
PreTokenizer read_pre_tokenizer(const nlohmann::json& json, const std::string& where);

/// A byte as the printable character that byte-level tokenizers write it as, in UTF-8.
const std::string& byte_level_character(std::uint8_t byte);

/// The byte that such a character stands for, or −1.
int byte_level_byte(char32_t character);

}  // namespace veloxquant
