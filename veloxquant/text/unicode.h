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

/// How many bytes at the end are the begin of a character that more bytes may complete: 0 to 3.
std::size_t incomplete_utf8(std::string_view bytes);

/// The character at `position` of valid UTF-8, which is moved behind it.
char32_t next_character(std::string_view text, std::size_t& position);

/// The character that ends at `position` of valid UTF-8, which is not its beginning.
char32_t character_before(std::string_view text, std::size_t position);

/// Appends a character as UTF-8.
void append_utf8(char32_t character, std::string& text);

enum class NormalForm { kNfc, kNfd, kNfkc, kNfkd };

/// A normal form of valid UTF-8, as Hugging Face's tokenizers have it (see kMarksSinceUnicode9).
std::string normalize(std::string_view text, NormalForm form);

/// Valid UTF-8 in lower case, character by character: a final Σ is no exception.
std::string lowercase(std::string_view text);

/// Unicode's White_Space.
bool is_white_space(char32_t character);

/// Where the white space that ends at `begin` starts, `least` at the earliest.
std::size_t skip_space_before(std::string_view text, std::size_t begin, std::size_t least);

/// Where the white space that starts at `end` ends.
std::size_t skip_space_after(std::string_view text, std::size_t end);

/// What \w means in Rust's regex: what is alphabetic, marks, decimal digits, connectors and joiners.
bool is_word_character(char32_t character);

}  // namespace veloxquant
