#include "veloxquant/text/unicode.h"

#include <utf8proc.h>

#include <algorithm>
#include <iterator>
#include <utility>
#include <vector>

#include "veloxquant/text/unicode_tables.h"

namespace veloxquant {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

struct Sequence {
  int length;              // 0: not a first byte
  std::uint8_t low, high;  // what the second byte may be; later ones are 80 to BF
};

Sequence sequence_of(std::uint8_t first) {
  if (first < 0x80) return {1, 0, 0};
  if (first >= 0xC2 && first <= 0xDF) return {2, 0x80, 0xBF};
  if (first == 0xE0) return {3, 0xA0, 0xBF};
  if (first == 0xED) return {3, 0x80, 0x9F};  // no surrogates
  if (first >= 0xE1 && first <= 0xEF) return {3, 0x80, 0xBF};
  if (first == 0xF0) return {4, 0x90, 0xBF};
  if (first >= 0xF1 && first <= 0xF3) return {4, 0x80, 0xBF};
  if (first == 0xF4) return {4, 0x80, 0x8F};
  return {0, 0, 0};
}

// Bytes at the start of `rest` that belong together, and whether they are a character.
std::pair<std::size_t, bool> take_character(std::string_view rest) {
  const Sequence sequence = sequence_of(static_cast<std::uint8_t>(rest[0]));
  if (sequence.length == 0) return {1, false};
  for (int i = 1; i < sequence.length; ++i) {
    if (static_cast<std::size_t>(i) == rest.size()) return {static_cast<std::size_t>(i), false};
    const auto byte = static_cast<std::uint8_t>(rest[static_cast<std::size_t>(i)]);
    if (i == 1 ? byte < sequence.low || byte > sequence.high : byte < 0x80 || byte > 0xBF)
      return {static_cast<std::size_t>(i), false};
  }
  return {static_cast<std::size_t>(sequence.length), true};
}

template <std::size_t kSize>
bool is_in(const CharacterRange (&ranges)[kSize], char32_t c) {
  const auto* after = std::upper_bound(std::begin(ranges), std::end(ranges), c,
                                       [](char32_t value, const CharacterRange& range) { return value < range.first; });
  return after != std::begin(ranges) && c <= (after - 1)->last;
}

int combining_class(utf8proc_int32_t c) {
  return utf8proc_get_property(c)->combining_class;
}

bool is_compatibility(NormalForm form) {
  return form == NormalForm::kNfkc || form == NormalForm::kNfkd;
}

bool is_composed(NormalForm form) {
  return form == NormalForm::kNfc || form == NormalForm::kNfkc;
}

void append_decomposed(char32_t character, NormalForm form, std::vector<utf8proc_int32_t>& characters) {
  const int compatibility = is_compatibility(form) ? UTF8PROC_COMPAT : 0;
  utf8proc_int32_t parts[32];  // the longest decomposition has 18
  int boundary_class = 0;
  const auto count = utf8proc_decompose_char(static_cast<utf8proc_int32_t>(character), parts, std::size(parts),
                                             static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_DECOMPOSE | compatibility),
                                             &boundary_class);
  characters.insert(characters.end(), parts, parts + count);
}

// Puts decomposed characters into canonical order, composes them if the form asks for it, and appends them.
void append_ordered(std::vector<utf8proc_int32_t>& characters, NormalForm form, std::string& text) {
  // utf8proc sorts marks by exchanging neighbours, which takes hours for a megabyte of them.
  for (auto begin = characters.begin(); begin != characters.end();) {
    const auto mark = std::find_if(begin, characters.end(), [](auto c) { return combining_class(c) != 0; });
    begin = std::find_if(mark, characters.end(), [](auto c) { return combining_class(c) == 0; });
    std::stable_sort(mark, begin, [](auto a, auto b) { return combining_class(a) < combining_class(b); });
  }
  auto count = static_cast<utf8proc_ssize_t>(characters.size());
  if (is_composed(form))
    count = utf8proc_normalize_utf32(characters.data(), count, static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
  for (utf8proc_ssize_t i = 0; i < count; ++i) append_utf8(static_cast<char32_t>(characters[static_cast<std::size_t>(i)]), text);
}

// Circled and squared letters: symbols by category, yet alphabetic.
bool is_letter_like_symbol(char32_t c) {
  return (c >= 0x24B6 && c <= 0x24E9) || (c >= 0x1F130 && c <= 0x1F149) || (c >= 0x1F150 && c <= 0x1F169) ||
         (c >= 0x1F170 && c <= 0x1F189);
}

}  // namespace

std::string repair_utf8(std::string_view bytes) {
  std::string text;
  text.reserve(bytes.size());
  while (!bytes.empty()) {
    const auto [length, valid] = take_character(bytes);
    text += valid ? bytes.substr(0, length) : kReplacement;
    bytes.remove_prefix(length);
  }
  return text;
}

std::size_t incomplete_utf8(std::string_view bytes) {
  constexpr std::size_t kLongest = 4;
  for (std::size_t count = 1; count < kLongest && count <= bytes.size(); ++count) {
    const auto end = bytes.substr(bytes.size() - count);
    const auto length = static_cast<std::size_t>(sequence_of(static_cast<std::uint8_t>(end[0])).length);
    if (length > 0) return length > count && take_character(end).first == count ? count : 0;
  }
  return 0;
}

char32_t next_character(std::string_view text, std::size_t& position) {
  const auto first = static_cast<std::uint8_t>(text[position]);
  const int length = sequence_of(first).length;
  char32_t character = length == 1 ? first : first & (0x7Fu >> length);
  for (int i = 1; i < length; ++i)
    character = (character << 6) | (static_cast<std::uint8_t>(text[position + static_cast<std::size_t>(i)]) & 0x3F);
  position += static_cast<std::size_t>(length);
  return character;
}

char32_t character_before(std::string_view text, std::size_t position) {
  std::size_t begin = position - 1;
  while (begin > 0 && (static_cast<unsigned char>(text[begin]) & 0xC0) == 0x80) --begin;
  return next_character(text, begin);
}

void append_utf8(char32_t character, std::string& text) {
  utf8proc_uint8_t bytes[4];
  text.append(reinterpret_cast<char*>(bytes),
              static_cast<std::size_t>(utf8proc_encode_char(static_cast<utf8proc_int32_t>(character), bytes)));
}

std::string normalize(std::string_view text, NormalForm form) {
  if (std::all_of(text.begin(), text.end(), [](char c) { return static_cast<unsigned char>(c) < 0x80; })) return std::string(text);
  std::string result;
  std::vector<utf8proc_int32_t> stretch;
  const auto flush = [&] {
    append_ordered(stretch, form, result);
    stretch.clear();
  };
  for (std::size_t position = 0; position < text.size();) {
    const char32_t character = next_character(text, position);
    if (is_in(kMarksSinceUnicode9, character) || is_in(kDecompositionsSinceUnicode9, character)) {
      flush();
      append_utf8(character, result);
    } else {
      // Nothing composes with ASCII before it, so that a stretch may end here and stay short.
      if (character < 0x80) flush();
      append_decomposed(character, form, stretch);
    }
  }
  flush();
  return result;
}

std::string lowercase(std::string_view text) {
  std::string result;
  for (std::size_t position = 0; position < text.size();) {
    const char32_t c = next_character(text, position);
    const auto* later = std::find_if(std::begin(kLowercaseSinceUnicode16), std::end(kLowercaseSinceUnicode16),
                                     [&](const LowercaseRange& range) { return c >= range.first && c <= range.last; });
    if (c == 0x130) {
      result += "i\u0307";  // the only one that becomes two
    } else if (later != std::end(kLowercaseSinceUnicode16)) {
      append_utf8(later->lowercase + (c - later->first), result);
    } else {
      append_utf8(static_cast<char32_t>(utf8proc_tolower(static_cast<utf8proc_int32_t>(c))), result);
    }
  }
  return result;
}

bool is_white_space(char32_t c) {
  return (c >= 0x09 && c <= 0x0D) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) ||
         c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

std::size_t skip_space_before(std::string_view text, std::size_t begin, std::size_t least) {
  while (begin > least && is_white_space(character_before(text, begin))) {
    do --begin;
    while ((static_cast<unsigned char>(text[begin]) & 0xC0) == 0x80);
  }
  return begin;
}

std::size_t skip_space_after(std::string_view text, std::size_t end) {
  while (end < text.size()) {
    std::size_t after = end;
    if (!is_white_space(next_character(text, after))) break;
    end = after;
  }
  return end;
}

bool is_word_character(char32_t c) {
  for (const auto& range : kAssignedSinceUnicode14)
    if (c >= range.first && c <= range.last) return range.category[0] == 'L' || range.category[0] == 'M' || range.category == "Nd";
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(c))) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC:
      return true;
    default:
      return c == 0x200C || c == 0x200D || is_letter_like_symbol(c);
  }
}

}  // namespace veloxquant
