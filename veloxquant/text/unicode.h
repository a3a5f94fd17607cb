// UTF-8 and what tokenizers ask of characters.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace veloxquant {

/// The text with each broken sequence replaced by U+FFFD, as Python's bytes.decode("utf-8", errors="replace") and Rust's
/// from_utf8_lossy do (one for every maximal prefix of a valid sequence).
std::string repair_utf8(std::string_view bytes);

/// The character at `position` of valid UTF-8, which is moved behind it.
char32_t next_character(std::string_view text, std::size_t& position);

/// Appends a character as UTF-8.
void append_utf8(char32_t character, std::string& text);

/// Normal form C of valid UTF-8, as Hugging Face's tokenizers have it (see kMarksSinceUnicode9).
std::string normalize_nfc(std::string_view text);

/// Unicode's White_Space.
bool is_white_space(char32_t character);

/// What \w means in Rust's regex: what is alphabetic, marks, decimal digits, connectors and joiners.
bool is_word_character(char32_t character);

}  // namespace veloxquant
