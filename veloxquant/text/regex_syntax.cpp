#include "veloxquant/text/regex_syntax.h"

#include <algorithm>
#include <cctype>
#include <optional>

#include "veloxquant/core/error.h"
#include "veloxquant/text/unicode_tables.h"

namespace veloxquant {
namespace {

// Bodies of sets.  PCRE2's own \s holds U+180E, which is no white space since Unicode 6.3; its \w has no marks but more numbers.
constexpr std::string_view kSpace = R"(\x09-\x0d\x20\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";
constexpr std::string_view kNotSpace =
    R"(\x00-\x08\x0e-\x1f\x21-\x{84}\x{86}-\x{9f}\x{a1}-\x{167f}\x{1681}-\x{1fff}\x{200b}-\x{2027}\x{202a}-\x{202e}\x{2030}-\x{205e})"
    R"(\x{2060}-\x{2fff}\x{3001}-\x{10ffff})";
// ²³¹¼½¾, which Oniguruma counts as \w where it stands alone but not in a set.
constexpr std::string_view kLatin1Numbers = R"(\x{b2}\x{b3}\x{b9}\x{bc}-\x{be})";
constexpr std::string_view kHexDigit = "0-9A-Fa-f";
constexpr std::string_view kHanSinceUnicode14 = R"(\x{2b739}\x{2ebf0}-\x{2ee5d}\x{31350}-\x{323af})";

constexpr std::string_view kSetEscapes = "sSdDwWhHpP";
constexpr std::string_view kPlainEscapes = "nrtfaev";
constexpr std::string_view kAnchors = "AzZGR";

std::string since_unicode14(std::string_view category) {
  std::string body;
  for (const auto& range : kAssignedSinceUnicode14)
    if (range.category.starts_with(category))
      body += fmt::format("\\x{{{:x}}}-\\x{{{:x}}}", static_cast<unsigned>(range.first), static_cast<unsigned>(range.last));
  return body;
}

bool is_general_category(std::string_view name) {
  return std::string_view("LMNPSZC").find(name[0]) != std::string_view::npos &&
         (name.size() == 1 || (name.size() == 2 && std::islower(static_cast<unsigned char>(name[1]))));
}

std::string property_body(std::string_view name) {
  if (is_general_category(name)) return fmt::format("\\p{{{}}}{}", name, since_unicode14(name));
  // sc: because PCRE2 would take the script extensions, such as 、 for Han.
  return fmt::format("\\p{{sc:{}}}{}", name, name == "Han" ? kHanSinceUnicode14 : "");
}

std::string word_body() {
  std::string body = R"(\p{Alphabetic}\p{M}\p{Nd}\p{Pc})";
  for (const char* category : {"L", "M", "Nd", "Nl", "Pc"}) body += since_unicode14(category);
  return body;
}

class Translator {
 public:
  Translator(std::string_view pattern, std::string_view where) : pattern_(pattern), where_(where) {}

  std::string translate() {
    while (!at_end()) {
      switch (peek()) {
        case '\\':
          escape();
          break;
        case '[':
          set();
          break;
        case '(':
          group();
          break;
        case '{':
          interval();
          break;
        default:
          copy();
      }
    }
    return std::move(result_);
  }

 private:
  struct SetEscape {
    std::string body;
    bool negated;
  };

  bool at_end() const { return position_ >= pattern_.size(); }
  char peek(std::size_t ahead = 0) const { return position_ + ahead < pattern_.size() ? pattern_[position_ + ahead] : '\0'; }
  bool next_is(std::string_view text) const { return pattern_.substr(position_).starts_with(text); }
  void copy() { result_ += pattern_[position_++]; }

  [[noreturn]] void refuse(std::string_view what) const {
    throw_failure("tokenizer", "{}: pattern \"{}\": {} (byte {}) is not supported", where_, excerpt(pattern_), what, position_);
  }

  // Takes the name in {…} or {^…} behind a \p or \P.
  SetEscape property(bool negated) {
    const std::size_t close = pattern_.find('}', position_);
    if (peek() != '{' || close == std::string_view::npos) refuse("a \\p without {…}");
    std::string_view name = pattern_.substr(position_ + 1, close - position_ - 1);
    if (name.starts_with('^')) {
      negated = !negated;
      name.remove_prefix(1);
    }
    const auto is_name = [](unsigned char c) { return std::isalnum(c) || c == '_'; };
    if (name.empty() || !std::all_of(name.begin(), name.end(), is_name)) refuse("this \\p{…}");
    position_ = close + 1;
    return {property_body(name), negated};
  }

  // Takes an escape that stands for a set of characters, if there is one here.
  std::optional<SetEscape> set_escape() {
    const char letter = peek(1);
    if (peek() != '\\' || letter == '\0' || kSetEscapes.find(letter) == std::string_view::npos) return std::nullopt;
    position_ += 2;
    const bool negated = std::isupper(static_cast<unsigned char>(letter));
    switch (std::tolower(static_cast<unsigned char>(letter))) {
      case 's':
        return SetEscape{std::string(kSpace), negated};
      case 'd':
        return SetEscape{property_body("Nd"), negated};
      case 'w':
        return SetEscape{word_body(), negated};
      case 'h':
        return SetEscape{std::string(kHexDigit), negated};
      default:
        return property(negated);
    }
  }

  static bool is_hexadecimal(std::string_view digits) {
    return !digits.empty() && std::all_of(digits.begin(), digits.end(), [](unsigned char c) { return std::isxdigit(c); });
  }

  // Takes a \u0000, \x00 or \x{0} of this many digits.
  void code_point(std::size_t begin, std::size_t count, std::size_t size) {
    const auto digits = pattern_.substr(std::min(begin, pattern_.size()), count);
    if (digits.size() < count || !is_hexadecimal(digits)) refuse("\\x or \\u without its digits");
    result_ += fmt::format("\\x{{{}}}", digits);
    position_ += size;
  }

  // An escape for one character, the same within sets and without.
  void character_escape() {
    const auto letter = static_cast<unsigned char>(peek(1));
    if (position_ + 1 >= pattern_.size()) refuse("a \\ at the end");
    if (letter == 'u') return code_point(position_ + 2, 4, 6);
    if (next_is("\\x{")) {
      const std::size_t digits = std::min(pattern_.find('}', position_), pattern_.size()) - position_ - 3;
      return code_point(position_ + 3, digits, digits + 4);
    }
    if (letter == 'x') {
      if (peek(2) > '7') refuse("\\x80 and above, which is a byte rather than a character,");
      return code_point(position_ + 2, 2, 4);
    }
    if (std::isalnum(letter) && kPlainEscapes.find(static_cast<char>(letter)) == std::string_view::npos)
      refuse(fmt::format("\\{}", static_cast<char>(letter)));
    result_ += letter == 'v' ? "\\x0b" : pattern_.substr(position_, 2);
    position_ += 2;
  }

  void escape() {
    const char letter = peek(1);
    if (const auto set = set_escape()) {
      const bool word = letter == 'w' || letter == 'W';
      result_ += fmt::format("[{}{}{}]", set->negated ? "^" : "", set->body, word ? kLatin1Numbers : "");
    } else if (letter == 'b' || letter == 'B') {
      const std::string word = fmt::format("[{}{}]", word_body(), kLatin1Numbers);
      const auto [first, second] = letter == 'b' ? std::pair("!", "=") : std::pair("=", "!");
      result_ += fmt::format("(?:(?<={0})(?{1}{0})|(?<!{0})(?{2}{0}))", word, first, second);
      position_ += 2;
    } else if (letter != '\0' && kAnchors.find(letter) != std::string_view::npos) {
      result_ += {'\\', letter};
      position_ += 2;
    } else {
      character_escape();
    }
  }

  void set() {
    copy();
    if (peek() == '^') copy();
    if (peek() == ']') literal_in_set();
    bool after_set = false;  // a - next to \s and the like is a -, not a range
    while (!at_end() && peek() != ']') {
      if (next_is("-\\") && kSetEscapes.find(peek(2)) != std::string_view::npos && !after_set) refuse("a range that ends in a set");
      if (peek() == '-' && after_set) {
        literal_in_set();
        after_set = false;
      } else {
        after_set = set_item();
      }
    }
    if (at_end()) refuse("a set without end");
    copy();
  }

  void literal_in_set() {
    result_ += '\\';
    copy();
  }

  // Returns whether it was a set of characters rather than one.
  bool set_item() {
    if (next_is("[:")) {
      posix_set();
      return true;
    }
    if (peek() == '[') refuse("a set within a set");
    if (next_is("&&")) refuse("&& in a set");
    if (next_is("\\S")) {
      result_ += kNotSpace;
      position_ += 2;
      return true;
    }
    if (const auto set = set_escape()) {
      if (set->negated) refuse("a negated escape other than \\S in a set");
      result_ += set->body;
      return true;
    }
    if (peek() == '\\') {
      character_escape();
    } else {
      copy();
    }
    return false;
  }

  void posix_set() {
    if (next_is("[:space:]")) {
      result_ += kSpace;
    } else if (next_is("[:digit:]")) {
      result_ += property_body("Nd");
    } else if (next_is("[:punct:]")) {
      result_ += property_body("P") + property_body("S");
    } else {
      refuse("a set within a set other than [:space:], [:digit:] and [:punct:]");
    }
    position_ = pattern_.find(']', position_) + 1;
  }

  void group() {
    if (next_is("(*")) refuse("(*");
    for (const std::string_view opening : {"(?:", "(?=", "(?!", "(?>", "(?<=", "(?<!"}) {
      if (!next_is(opening)) continue;
      result_ += opening;
      position_ += opening.size();
      return;
    }
    if (next_is("(?")) {
      options();
    } else {
      copy();
    }
  }

  // (?i:…), (?m:…), (?-i:…) and the like; without a colon only at the start, where there is no doubt how far they reach.
  void options() {
    const std::size_t start = position_;
    std::string options = "(?";
    for (position_ += 2; peek() == 'i' || peek() == 'm' || peek() == '-'; ++position_)
      options += peek() == 'm' ? 's' : peek();  // Oniguruma's m lets . match a line's end
    const bool whole = peek() == ')' && start == 0;
    if (peek() != ':' && !whole) {
      position_ = start;
      refuse("this group");
    }
    result_ += options;
    copy();
  }

  // {n}, {n,}, {n,m} and {,m}; any other { is a character.
  void interval() {
    std::size_t end = position_ + 1;
    const auto digits = [&] {
      const std::size_t begin = end;
      while (end < pattern_.size() && std::isdigit(static_cast<unsigned char>(pattern_[end]))) ++end;
      return pattern_.substr(begin, end - begin);
    };
    const std::string_view least = digits();
    const bool comma = end < pattern_.size() && pattern_[end] == ',';
    if (comma) ++end;
    const std::string_view most = comma ? digits() : least;
    if (end >= pattern_.size() || pattern_[end] != '}' || (least.empty() && most.empty())) return literal_in_set();
    result_ += fmt::format("{{{}{}{}}}", least.empty() ? "0" : least, comma ? "," : "", comma ? most : "");
    position_ = end + 1;
    if (peek() == '+' || (peek() == '?' && !comma)) refuse("a second quantifier");
  }

  std::string_view pattern_, where_;
  std::size_t position_ = 0;
  std::string result_;
};

}  // namespace

std::string to_pcre2(std::string_view pattern, std::string_view where) {
  return Translator(pattern, where).translate();
}

std::string escape_regex(std::string_view literal) {
  std::string pattern;
  for (const char c : literal) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x80 && !std::isalnum(byte)) pattern += '\\';
    pattern += c;
  }
  return pattern;
}

}  // namespace veloxquant
