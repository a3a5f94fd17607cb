#include "veloxquant/text/pre_tokenizer.h"

#include <array>
#include <unordered_map>

#include "veloxquant/core/error.h"
#include "veloxquant/text/regex.h"
#include "veloxquant/text/regex_syntax.h"
#include "veloxquant/text/unicode.h"

namespace veloxquant {
namespace {

constexpr const char* kSupported = "one of Split, ByteLevel, Digits, Sequence, or null";

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
  return [regex = std::move(regex), behavior, invert](const std::vector<std::string>& words) {
    std::vector<std::string> result;
    for (const auto& word : words)
      for (const auto& piece : behavior(pieces_of(regex, word, invert)))
        if (piece.begin < piece.end) result.push_back(word.substr(piece.begin, piece.end - piece.begin));
    return result;
  };
}

PreTokenizer read_split(const JsonObject& json) {
  const JsonObject pattern = json.object("pattern");
  const bool literal = pattern.has("String");
  if (!literal && !pattern.has("Regex")) json.refuse("pattern", "an object with Regex or String");
  const std::string text = literal ? escape_regex(pattern.string("String")) : pattern.string("Regex");
  return split(Regex(text, json.where()), read_behavior(json), json.boolean_or("invert", false));
}

std::string as_byte_level(std::string_view word) {
  std::string result;
  for (const char c : word) result += byte_level_character(static_cast<std::uint8_t>(c));
  return result;
}

PreTokenizer read_byte_level(const JsonObject& json) {
  const bool add_prefix_space = json.boolean_or("add_prefix_space", true);
  PreTokenizer cut = [](std::vector<std::string> words) { return words; };
  if (json.boolean_or("use_regex", true)) cut = split(Regex(kByteLevelPattern, json.where()), isolated, false);
  return [add_prefix_space, cut](std::vector<std::string> words) {
    if (add_prefix_space)
      for (auto& word : words)
        if (!word.starts_with(' ')) word.insert(0, 1, ' ');
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

PreTokenizer read_sequence(const JsonObject& json) {
  const auto& list = json.at("pretokenizers");
  if (!list.is_array()) json.refuse("pretokenizers", "a list");
  std::vector<PreTokenizer> parts;
  for (const auto& item : list)
    parts.push_back(read_pre_tokenizer(item, fmt::format("{}: pretokenizers[{}]", json.where(), parts.size())));
  return [parts](std::vector<std::string> words) {
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
  if (value.is_null()) return [](std::vector<std::string> words) { return words; };
  const JsonObject json(value, where);
  const std::string type = json.string("type");
  if (type == "Split") return read_split(json);
  if (type == "ByteLevel") return read_byte_level(json);
  if (type == "Digits") return read_digits(json);
  if (type == "Sequence") return read_sequence(json);
  json.refuse("type", kSupported);
}

const std::string& byte_level_character(std::uint8_t byte) {
  return byte_level_table().characters[byte];
}

int byte_level_byte(char32_t character) {
  const auto found = byte_level_table().bytes.find(character);
  return found == byte_level_table().bytes.end() ? -1 : found->second;
}

}  // namespace veloxquant
