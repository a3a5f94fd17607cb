// Tokens that are found in the text before it is cut into words.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace veloxquant {

struct AddedToken {
  std::int32_t id = 0;
  std::string content;
  bool special = false;                 // left out by decoding on request
  bool normalized = false;              // looked for in the normalised text, in normal form
  bool single_word = false;             // only where no character of a word stands beside it
  bool lstrip = false, rstrip = false;  // takes the white space before, after it along
};

/// A stretch of text: a token, or text between tokens.
struct TextPart {
  std::int32_t token;      // −1: text
  std::size_t begin, end;  // bytes
};

/// Finds added tokens from left to right, of those that start at one place the longest.
class AddedTokenFinder {
 public:
  /// `patterns`: what to look for, and its token; of equal patterns the last one counts, empty ones do not.
  explicit AddedTokenFinder(std::vector<std::pair<std::string, AddedToken>> patterns);

  /// The parts of valid UTF-8 in order.
  std::vector<TextPart> split(std::string_view text) const;

 private:
  const std::pair<const std::string, AddedToken>* longest_at(std::string_view rest) const;

  std::unordered_map<std::string, AddedToken> patterns_;
  std::array<std::vector<std::size_t>, 256> lengths_;  // of the patterns that start with a byte, longest first
};

}  // namespace veloxquant
