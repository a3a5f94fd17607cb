#include "veloxquant/text/added_tokens.h"

#include <algorithm>

#include "veloxquant/text/unicode.h"

namespace veloxquant {
namespace {

char32_t character_before(std::string_view text, std::size_t position) {
  std::size_t begin = position - 1;
  while (begin > 0 && (static_cast<unsigned char>(text[begin]) & 0xC0) == 0x80) --begin;
  return next_character(text, begin);
}

bool stands_alone(std::string_view text, std::size_t begin, std::size_t end) {
  if (begin > 0 && is_word_character(character_before(text, begin))) return false;
  return end == text.size() || !is_word_character(next_character(text, end));
}

std::size_t without_space_before(std::string_view text, std::size_t begin) {
  while (begin > 0) {
    std::size_t at = begin - 1;
    while (at > 0 && (static_cast<unsigned char>(text[at]) & 0xC0) == 0x80) --at;
    std::size_t after = at;
    if (!is_white_space(next_character(text, after))) break;
    begin = at;
  }
  return begin;
}

std::size_t without_space_after(std::string_view text, std::size_t end) {
  while (end < text.size()) {
    std::size_t after = end;
    if (!is_white_space(next_character(text, after))) break;
    end = after;
  }
  return end;
}

}  // namespace

AddedTokenFinder::AddedTokenFinder(std::vector<std::pair<std::string, AddedToken>> patterns) : patterns_(std::move(patterns)) {
  std::erase_if(patterns_, [](const auto& pattern) { return pattern.first.empty(); });
  std::stable_sort(patterns_.begin(), patterns_.end(), [](const auto& a, const auto& b) { return a.first.size() > b.first.size(); });
  for (std::size_t i = 0; i < patterns_.size(); ++i) by_first_[patterns_[i].first[0]].push_back(i);
}

const std::pair<std::string, AddedToken>* AddedTokenFinder::longest_at(std::string_view rest) const {
  const auto found = by_first_.find(rest[0]);
  if (found == by_first_.end()) return nullptr;
  for (const std::size_t index : found->second)
    if (rest.starts_with(patterns_[index].first)) return &patterns_[index];
  return nullptr;
}

std::vector<TextPart> AddedTokenFinder::split(std::string_view text) const {
  std::vector<TextPart> parts;
  std::size_t done = 0;
  for (std::size_t at = 0; at < text.size();) {
    const auto* pattern = longest_at(text.substr(at));
    if (!pattern) {
      ++at;
      continue;
    }
    std::size_t begin = at, end = at + pattern->first.size();
    at = end;
    const AddedToken& token = pattern->second;
    if (begin < done || (token.single_word && !stands_alone(text, begin, end))) continue;
    if (token.lstrip) begin = std::max(without_space_before(text, begin), done);
    if (token.rstrip) end = without_space_after(text, end);
    if (done < begin) parts.push_back({-1, text.substr(done, begin - done)});
    parts.push_back({token.id, text.substr(begin, end - begin)});
    done = end;
  }
  if (done < text.size()) parts.push_back({-1, text.substr(done)});
  return parts;
}

}  // namespace veloxquant
