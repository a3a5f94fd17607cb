#include "veloxquant/text/bpe.h"

#include <algorithm>
#include <iterator>
#include <queue>
#include <tuple>
#include <utility>

#include "veloxquant/core/error.h"
#include "veloxquant/text/unicode.h"

namespace veloxquant {
namespace {

constexpr std::int64_t kMaxToken = (1 << 24) - 1;

std::uint64_t pair_key(std::int32_t left, std::int32_t right) {
  return static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32 | static_cast<std::uint32_t>(right);
}

void refuse_unsupported(const JsonObject& json) {
  if (json.string_or("type", "BPE") != "BPE") json.refuse("type", "BPE");
  if (json.has("dropout") && json.number("dropout") != 0) json.refuse("dropout", "null or 0");
  for (const char* field : {"continuing_subword_prefix", "end_of_word_suffix"})
    if (!json.string_or(field, "").empty()) json.refuse(field, "null or an empty string");
}

// Two tokens, written "a b" or ["a", "b"]; a pair of empty ones for the line of a merges.txt that says its version.
std::optional<std::pair<std::string, std::string>> parse_merge(const nlohmann::json& json) {
  if (json.is_array() && json.size() == 2 && json[0].is_string() && json[1].is_string())
    return std::pair(json[0].get<std::string>(), json[1].get<std::string>());
  if (!json.is_string()) return std::nullopt;
  const auto text = json.get<std::string>();
  if (text.starts_with("#version")) return std::pair<std::string, std::string>();
  const auto space = text.find(' ');
  if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos) return std::nullopt;
  return std::pair(text.substr(0, space), text.substr(space + 1));
}

// A linked list of tokens over an array, so that a merge costs no moving.
struct Symbol {
  std::int32_t token;
  int previous, next;  // −1: none
};

struct Candidate {
  std::int32_t rank;
  int position;              // of the left symbol
  std::int32_t left, right;  // as they were when the candidate was found: stale if they changed
  std::int32_t merged;

  // The lowest rank first, and of one rank the leftmost.
  bool operator<(const Candidate& other) const { return std::tie(rank, position) > std::tie(other.rank, other.position); }
};

}  // namespace

Bpe::Bpe(const JsonObject& json) {
  refuse_unsupported(json);
  read_vocabulary(json);
  read_merges(json);
  fuse_unknown_ = json.boolean_or("fuse_unk", false);
  ignore_merges_ = json.boolean_or("ignore_merges", false);
  unknown_ = json.string_or("unk_token", "");
  where_ = json.where();
  if (json.boolean_or("byte_fallback", false)) read_byte_tokens();
}

void Bpe::read_vocabulary(const JsonObject& json) {
  const JsonObject vocabulary = json.object("vocab");
  std::unordered_map<std::int64_t, std::string> taken;
  for (const auto& [token, id] : json.at("vocab").items()) {
    const auto value = vocabulary.integer(token, 0, kMaxToken);
    const auto [other, added] = taken.emplace(value, token);
    if (!added) vocabulary.refuse(token, fmt::format("an id of its own, which \"{}\" has already", other->second));
    vocabulary_.emplace(token, static_cast<std::int32_t>(value));
  }
}

void Bpe::read_merges(const JsonObject& json) {
  const auto& list = json.at("merges");
  if (!list.is_array()) json.refuse("merges", "a list");
  const auto id_of = [&](const std::string& token, std::size_t index) {
    const auto found = vocabulary_.find(token);
    if (found == vocabulary_.end())
      throw_failure("tokenizer", "{}: merges[{}]: \"{}\" is not in the vocabulary", json.where(), index, token);
    return found->second;
  };
  for (std::size_t i = 0; i < list.size(); ++i) {
    const auto merge = parse_merge(list[i]);
    if (!merge)
      throw_failure("tokenizer", "{}: merges[{}]: expected two tokens, as \"a b\" or [\"a\", \"b\"], got {}", json.where(), i,
                    list[i].dump(-1, ' ', false, nlohmann::json::error_handler_t::replace).substr(0, 60));
    const auto& [left, right] = *merge;
    if (!left.empty()) merges_[pair_key(id_of(left, i), id_of(right, i))] = {static_cast<std::int32_t>(i), id_of(left + right, i)};
  }
}

void Bpe::read_byte_tokens() {
  auto& tokens = byte_tokens_.emplace();
  for (std::size_t byte = 0; byte < tokens.size(); ++byte) {
    const auto found = vocabulary_.find(fmt::format("<0x{:02X}>", byte));
    tokens[byte] = found == vocabulary_.end() ? -1 : found->second;
  }
}

std::int32_t Bpe::unknown_token(std::string_view character) const {
  const auto found = vocabulary_.find(unknown_);
  if (found == vocabulary_.end())
    throw_failure("tokenizer", "{}: neither \"{}\" of the text nor unk_token \"{}\" is in the vocabulary", where_, character,
                  unknown_);
  return found->second;
}

bool Bpe::append_bytes(std::string_view character, std::vector<std::int32_t>& tokens) const {
  if (!byte_tokens_) return false;
  const auto token_of = [&](char c) { return (*byte_tokens_)[static_cast<std::uint8_t>(c)]; };
  if (std::any_of(character.begin(), character.end(), [&](char c) { return token_of(c) < 0; })) return false;
  std::transform(character.begin(), character.end(), std::back_inserter(tokens), token_of);
  return true;
}

// An unknown token waits for the next character that is known, or for another one.  So the bytes of characters between come before
// it, as in Hugging Face's tokenizers.
std::vector<std::int32_t> Bpe::characters(std::string_view word) const {
  std::vector<std::int32_t> tokens;
  std::int32_t waiting = -1;
  const auto flush = [&] {
    if (waiting >= 0) tokens.push_back(waiting);
    waiting = -1;
  };
  for (std::size_t position = 0; position < word.size();) {
    const std::size_t begin = position;
    next_character(word, position);
    const std::string character(word.substr(begin, position - begin));
    if (const auto found = vocabulary_.find(character); found != vocabulary_.end()) {
      flush();
      tokens.push_back(found->second);
    } else if (!append_bytes(character, tokens) && !unknown_.empty()) {
      if (!fuse_unknown_) flush();
      waiting = unknown_token(character);
    }
  }
  flush();
  return tokens;
}

void Bpe::encode(std::string_view word, std::vector<std::int32_t>& tokens) const {
  if (ignore_merges_) {
    if (const auto found = vocabulary_.find(std::string(word)); found != vocabulary_.end()) {
      tokens.push_back(found->second);
      return;
    }
  }
  merge(characters(word), tokens);
}

// Best merge first, with a queue: n log n where trying all pairs after every merge would take n².
void Bpe::merge(const std::vector<std::int32_t>& start, std::vector<std::int32_t>& tokens) const {
  const int count = static_cast<int>(start.size());
  std::vector<Symbol> symbols;
  symbols.reserve(start.size());
  for (int i = 0; i < count; ++i) symbols.push_back({start[static_cast<std::size_t>(i)], i - 1, i + 1 < count ? i + 1 : -1});
  const auto at = [&](int i) -> Symbol& { return symbols[static_cast<std::size_t>(i)]; };

  std::priority_queue<Candidate> queue;
  const auto consider = [&](int position) {
    if (position < 0 || at(position).next < 0) return;
    const std::int32_t left = at(position).token, right = at(at(position).next).token;
    if (const auto merge = merges_.find(pair_key(left, right)); merge != merges_.end())
      queue.push({merge->second.rank, position, left, right, merge->second.token});
  };
  for (int i = 0; i + 1 < count; ++i) consider(i);
  while (!queue.empty()) {
    const Candidate best = queue.top();
    queue.pop();
    Symbol& left = at(best.position);
    if (left.token != best.left || left.next < 0 || at(left.next).token != best.right) continue;
    Symbol& right = at(left.next);
    left.token = best.merged;
    right.token = -1;
    left.next = right.next;
    if (left.next >= 0) at(left.next).previous = best.position;
    consider(left.previous);
    consider(best.position);
  }
  for (int i = count > 0 ? 0 : -1; i >= 0; i = at(i).next) tokens.push_back(at(i).token);
}

}  // namespace veloxquant
