// Tokens that are found in the text before it is cut into words.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace veloxquant {

struct AddedToken {
  std::int32_t id;
  std::string content;
  bool special;      // left out by decoding on request
  bool normalized;   // looked for in the normalised text
  bool single_word;  // only between characters that are not of a word
  bool lstrip, rstrip;  // takes the white space before, after it along
};

/// A stretch of text: a token, or text between tokens.
struct TextPart {
  std::int32_t token;  // −1: text
  std::string_view text;
};

/// Finds added tokens from left to right, of those that start at one place the longest.
class AddedTokenFinder {
 public:
  /// `patterns`: what to look for, beside its token.
  explicit AddedTokenFinder(std::vector<std::pair<std::string, AddedToken>> patterns);

  std::vector<TextPart> split(std::string_view text) const;

 private:
  const std::pair<std::string, AddedToken>* longest_at(std::string_view rest) const;

  std::vector<std::pair<std::string, AddedToken>> patterns_;      // longest first
  std::unordered_map<char, std::vector<std::size_t>> by_first_;  // indices of patterns_ by first byte
};

}  // namespace veloxquant
