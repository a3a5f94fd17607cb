#include "veloxquant/text/added_tokens.h"

#include <algorithm>
#include <functional>

#include "veloxquant/text/unicode.h"

namespace veloxquant {
namespace {

bool stands_alone(std::string_view text, std::size_t begin, std::size_t end) {
  if (begin > 0 && is_word_character(character_before(text, begin))) return false;
  return end == text.size() || !is_word_character(next_character(text, end));
}

}  // namespace

AddedTokenFinder::AddedTokenFinder(std::vector<std::pair<std::string, AddedToken>> patterns) {
  for (auto& [pattern, token] : patterns) {
    if (pattern.empty()) continue;
    lengths_[static_cast<unsigned char>(pattern[0])].push_back(pattern.size());
    patterns_.insert_or_assign(std::move(pattern), std::move(token));
  }
  for (auto& lengths : lengths_) {
    std::sort(lengths.begin(), lengths.end(), std::greater<>());
    lengths.erase(std::unique(lengths.begin(), lengths.end()), lengths.end());
  }
}

const std::pair<const std::string, AddedToken>* AddedTokenFinder::longest_at(std::string_view rest) const {
  for (const std::size_t length : lengths_[static_cast<unsigned char>(rest[0])]) {
    if (length > rest.size()) continue;
    if (const auto found = patterns_.find(std::string(rest.substr(0, length))); found != patterns_.end()) return &*found;
  }
  return nullptr;
}

// The search goes on behind the pattern itself, not behind the white space that rstrip takes along: a token that begins with white
// space may be found there, as Hugging Face's tokenizers find it.
std::vector<TextPart> AddedTokenFinder::split(std::string_view text) const {
  std::vector<TextPart> parts;
  std::size_t done = 0, space_end = 0;
  for (std::size_t at = 0; at < text.size();) {
    const auto* found = longest_at(text.substr(at));
    if (!found) {
      ++at;
      continue;
    }
    const AddedToken& token = found->second;
    std::size_t begin = at, end = at + found->first.size();
    at = end;
    if (token.single_word && !stands_alone(text, begin, end)) continue;
    if (token.lstrip) begin = std::max(skip_space_before(text, begin, done), done);
    if (token.rstrip) end = space_end = end < space_end ? space_end : skip_space_after(text, end);
    if (done < begin) parts.push_back({-1, done, begin});
    if (begin < end) parts.push_back({token.id, begin, end});
    done = end;
  }
  if (done < text.size()) parts.push_back({-1, done, text.size()});
  return parts;
}

}  // namespace veloxquant
