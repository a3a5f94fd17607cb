#include "veloxquant/text/pre_tokenizer.h"

#include <array>
#include <unordered_map>

#include "veloxquant/core/error.h"
#include "veloxquant/text/regex.h"
#include "veloxquant/text/regex_syntax.h"
#include "veloxquant/text/unicode.h"
#include "veloxquant/text/unicode_tables.h"

namespace veloxquant {
namespace {

constexpr const char* kSupported = "one of Split, ByteLevel, Digits, Metaspace, Punctuation, Sequence, or null";

// GPT-2's, which ByteLevel uses where it is not told otherwise.
constexpr const char* kByteLevelPattern = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

struct Piece {
  std::size_t begin, end;
  bool matched;
};

// The whole text as pieces that match and pieces between.
std::vector<Piece> pieces_of(const Regex& regex, std::string_view text, bool invert) {
  std::vector<Piece> pieces;
  std::size_t done = 0;
  for (const auto& match : regex.find_all(text)) {
    if (done != match.begin) pieces.push_back({done, match.begin, invert});
    pieces.push_back({match.begin, match.end, !invert});
    done = match.end;
  }
  if (done != text.size()) pieces.push_back({done, text.size(), invert});
  return pieces;
}

using Behavior = std::vector<Piece> (*)(std::vector<Piece> pieces);

std::vector<Piece> isolated(std::vector<Piece> pieces) {
  return pieces;
}

std::vector<Piece> removed(std::vector<Piece> pieces) {
  std::erase_if(pieces, [](const Piece& piece) { return piece.matched; });
  return pieces;
}

std::vector<Piece> contiguous(std::vector<Piece> pieces) {
  std::vector<Piece> result;
  for (const auto& piece : pieces) {
    if (!result.empty() && result.back().matched == piece.matched) {
      result.back().end = piece.end;
    } else {
      result.push_back(piece);
    }
  }
  return result;
}

// A match joins the piece before it, unless that is a match too.
std::vector<Piece> merged_with_previous(std::vector<Piece> pieces) {
  std::vector<Piece> result;
  bool previous = false;
  for (const auto& piece : pieces) {
    if (piece.matched && !previous && !result.empty()) {
      result.back().end = piece.end;
    } else {
      result.push_back(piece);
    }
    previous = piece.matched;
  }
  return result;
}

std::vector<Piece> merged_with_next(std::vector<Piece> pieces) {
  std::vector<Piece> result;
  bool next = false;
  for (auto piece = pieces.rbegin(); piece != pieces.rend(); ++piece) {
    if (piece->matched && !next && !result.empty()) {
      result.back().begin = piece->begin;
    } else {
      result.push_back(*piece);
    }
    next = piece->matched;
  }
  return {result.rbegin(), result.rend()};
}

Behavior read_behavior(const JsonObject& json) {
  static const std::unordered_map<std::string, Behavior> table = {{"Isolated", isolated},
                                                                  {"Removed", removed},
                                                                  {"Contiguous", contiguous},
                                                                  {"MergedWithPrevious", merged_with_previous},
                                                                  {"MergedWithNext", merged_with_next}};
  const auto found = table.find(json.string("behavior"));
  if (found == table.end()) json.refuse("behavior", "Isolated, Removed, Contiguous, MergedWithPrevious or MergedWithNext");
  return found->second;
}

PreTokenizer split(Regex regex, Behavior behavior, bool invert) {
  return [regex = std::move(regex), behavior, invert](const std::vector<Stretch>& words) {
    std::vector<Stretch> result;
    for (const auto& word : words)
      for (const auto& piece : behavior(pieces_of(regex, word.text, invert)))
        if (piece.begin < piece.end) result.push_back(slice(word, piece.begin, piece.end));
    return result;
  };
}

PreTokenizer read_split(const JsonObject& json) {
  return split(read_pattern(json), read_behavior(json), json.boolean_or("invert", false));
}

PreTokenizer as_they_are() {
  return [](std::vector<Stretch> words) { return words; };
}

Stretch as_byte_level(const Stretch& word) {
  Stretch result;
  for (std::size_t i = 0; i < word.text.size(); ++i) {
    result.text += byte_level_character(static_cast<std::uint8_t>(word.text[i]));
    if (i < word.origin) result.origin = result.text.size();
  }
  return result;
}

PreTokenizer read_byte_level(const JsonObject& json) {
  const bool add_prefix_space = json.boolean_or("add_prefix_space", true);
  PreTokenizer cut = as_they_are();
  if (json.boolean_or("use_regex", true)) cut = split(Regex(kByteLevelPattern, json.where()), isolated, false);
  return [add_prefix_space, cut](std::vector<Stretch> words) {
    if (add_prefix_space)
      for (auto& word : words)
        if (!word.text.starts_with(' ')) word = prepend(std::move(word), " ");
    words = cut(std::move(words));
    for (auto& word : words) word = as_byte_level(word);
    return words;
  };
}

PreTokenizer read_digits(const JsonObject& json) {
  // Rust's char::is_numeric, which Digits goes by, is the categories Nd, Nl and No of Unicode 17.
  return split(Regex(R"([\p{N}\x{11de0}-\x{11de9}\x{16ff4}-\x{16ff6}])", json.where()),
               json.boolean_or("individual_digits", false) ? isolated : contiguous, false);
}

PreTokenizer read_punctuation(const JsonObject& json) {
  std::string before_unicode8, since_unicode8;
  for (const char32_t c : kPunctuationUpToUnicode8) append_utf8(c, before_unicode8);
  for (const auto& [first, last] : kPunctuationSinceUnicode8)
    since_unicode8 += fmt::format(R"(\x{{{:x}}}-\x{{{:x}}})", std::uint32_t{first}, std::uint32_t{last});
  const std::string pattern = fmt::format(R"((?![{}])[\p{{P}}$+<=>\^`|~{}])", since_unicode8, before_unicode8);
  return split(Regex(pattern, json.where()), json.has("behavior") ? read_behavior(json) : isolated, false);
}

PreTokenizer read_metaspace_pre_tokenizer(const JsonObject& json) {
  const Metaspace metaspace = read_metaspace(json);
  const Regex space(" ", json.where());
  PreTokenizer cut = as_they_are();
  if (metaspace.split) cut = split(Regex(escape_regex(metaspace.replacement), json.where()), merged_with_next, false);
  return [metaspace, space, cut](std::vector<Stretch> words) {
    for (auto& word : words) {
      word = replace(word, space, metaspace.replacement);
      const bool prepends =
          metaspace.prepend == Metaspace::Prepend::kAlways || (metaspace.prepend == Metaspace::Prepend::kFirst && word.origin > 0);
      if (prepends && !word.text.starts_with(metaspace.replacement)) word = prepend(std::move(word), metaspace.replacement);
    }
    return cut(std::move(words));
  };
}

PreTokenizer read_sequence(const JsonObject& json) {
  const auto& list = json.at("pretokenizers");
  if (!list.is_array()) json.refuse("pretokenizers", "a list");
  std::vector<PreTokenizer> parts;
  for (const auto& item : list)
    parts.push_back(read_pre_tokenizer(item, fmt::format("{}: pretokenizers[{}]", json.where(), parts.size())));
  return [parts](std::vector<Stretch> words) {
    for (const auto& part : parts) words = part(std::move(words));
    return words;
  };
}

struct ByteLevelTable {
  std::array<std::string, 256> characters;
  std::unordered_map<char32_t, int> bytes;

  // Printable bytes stand for themselves, the others for characters from U+0100 on.
  ByteLevelTable() {
    char32_t next = 0x100;
    for (int byte = 0; byte < 256; ++byte) {
      const bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
      const char32_t character = printable ? static_cast<char32_t>(byte) : next++;
      append_utf8(character, characters[static_cast<std::size_t>(byte)]);
      bytes[character] = byte;
    }
  }
};

const ByteLevelTable& byte_level_table() {
  static const ByteLevelTable table;
  return table;
}

}  // namespace

PreTokenizer read_pre_tokenizer(const nlohmann::json& value, const std::string& where) {
  if (value.is_null()) return as_they_are();
  const JsonObject json(value, where);
  const std::string type = json.string("type");
  if (type == "Split") return read_split(json);
  if (type == "ByteLevel") return read_byte_level(json);
  if (type == "Digits") return read_digits(json);
  if (type == "Metaspace") return read_metaspace_pre_tokenizer(json);
  if (type == "Punctuation") return read_punctuation(json);
  if (type == "Sequence") return read_sequence(json);
  json.refuse("type", kSupported);
}

Metaspace read_metaspace(const JsonObject& json) {
  static const std::unordered_map<std::string, Metaspace::Prepend> table = {
      {"always", Metaspace::Prepend::kAlways}, {"first", Metaspace::Prepend::kFirst}, {"never", Metaspace::Prepend::kNever}};
  const auto prepend = table.find(json.string_or("prepend_scheme", "always"));
  if (prepend == table.end()) json.refuse("prepend_scheme", "always, first or never");
  // Older files say this and nothing more; Hugging Face's tokenizers refuse it beside another prepend_scheme, too.
  if (!json.boolean_or("add_prefix_space", true) && prepend->second != Metaspace::Prepend::kNever)
    json.refuse("add_prefix_space", "true, or prepend_scheme never beside it");
  return {read_character(json, "replacement"), prepend->second, json.boolean_or("split", true)};
}

std::string read_character(const JsonObject& json, std::string_view field) {
  std::string text = json.string(field);
  std::size_t end = 0;
  if (!text.empty()) next_character(text, end);
  if (end == 0 || end < text.size()) json.refuse(field, "one character");
  return text;
}

const std::string& byte_level_character(std::uint8_t byte) {
  return byte_level_table().characters[byte];
}

int byte_level_byte(char32_t character) {
  const auto found = byte_level_table().bytes.find(character);
  return found == byte_level_table().bytes.end() ? -1 : found->second;
}

}  // namespace veloxquant
