#include "veloxquant/text/tokenizer.h"

#include <algorithm>

#include "veloxquant/core/error.h"
#include "veloxquant/text/unicode.h"

namespace veloxquant {
namespace {

constexpr std::int64_t kMaxToken = (1 << 24) - 1;

// NFC, alone or in sequences; anything else is refused.
bool read_nfc(const nlohmann::json& value, const std::string& where) {
  if (value.is_null()) return false;
  const JsonObject json(value, where);
  const std::string type = json.string("type");
  if (type == "NFC") return true;
  if (type != "Sequence") json.refuse("type", "NFC, a Sequence of it, or null");
  if (!json.at("normalizers").is_array()) json.refuse("normalizers", "a list");
  bool nfc = false;
  for (const auto& item : json.at("normalizers")) nfc |= read_nfc(item, where + ": normalizers");
  return nfc;
}

// Whether there is a decoder; only the byte-level one is supported.
bool read_decoder(const nlohmann::json& value, const std::string& where) {
  if (value.is_null()) return false;
  const JsonObject json(value, where);
  const std::string type = json.string("type");
  if (type == "ByteLevel") return true;
  if (type != "Sequence" || !json.at("decoders").is_array() || json.at("decoders").size() != 1) json.refuse("type", "ByteLevel, a Sequence of it alone, or null");
  return read_decoder(json.at("decoders")[0], where + ": decoders[0]");
}

const nlohmann::json& field_or_null(const JsonObject& json, const char* field) {
  static const nlohmann::json null;
  return json.has(field) ? json.at(field) : null;
}

// The bytes of a token; one with characters that stand for no byte is taken as it is.
std::string bytes_of(const std::string& content) {
  std::string bytes;
  for (std::size_t position = 0; position < content.size();) {
    const int byte = byte_level_byte(next_character(content, position));
    if (byte < 0) return content;
    bytes += static_cast<char>(byte);
  }
  return bytes;
}

}  // namespace

Tokenizer Tokenizer::load(const std::filesystem::path& folder) {
  const auto path = folder / "tokenizer.json";
  const auto document = read_json(path);
  return Tokenizer(JsonObject(document, path.string()));
}

Tokenizer::Tokenizer(const JsonObject& json)
    : bpe_(json.object("model")),
      nfc_(read_nfc(field_or_null(json, "normalizer"), json.where() + ": normalizer")),
      pre_tokenizer_(read_pre_tokenizer(field_or_null(json, "pre_tokenizer"), json.where() + ": pre_tokenizer")),
      joins_with_spaces_(!read_decoder(field_or_null(json, "decoder"), json.where() + ": decoder")) {
  for (const auto& [content, id] : bpe_.vocabulary()) contents_[id] = content;
  read_added_tokens(json);
  read_post_processor(field_or_null(json, "post_processor"), json.where() + ": post_processor");
  for (const auto& [id, content] : contents_) vocabulary_size_ = std::max(vocabulary_size_, id + 1);
}

void Tokenizer::read_added_tokens(const JsonObject& json) {
  std::vector<std::pair<std::string, AddedToken>> raw, normalized;
  if (json.has("added_tokens")) {
    if (!json.at("added_tokens").is_array()) json.refuse("added_tokens", "a list");
    for (const auto& item : json.at("added_tokens")) {
      const JsonObject field(item, fmt::format("{}: added_tokens[{}]", json.where(), added_.size()));
      const bool special = field.boolean_or("special", false);
      const AddedToken token{.id = static_cast<std::int32_t>(field.integer("id", 0, kMaxToken)),
                             .content = field.string("content"),
                             .special = special,
                             .normalized = field.boolean_or("normalized", !special),
                             .single_word = field.boolean_or("single_word", false),
                             .lstrip = field.boolean_or("lstrip", false),
                             .rstrip = field.boolean_or("rstrip", false)};
      added_.push_back(token);
      contents_[token.id] = token.content;
      if (token.special) special_.insert(token.id);
      (token.normalized ? normalized : raw).emplace_back(token.normalized && nfc_ ? normalize_nfc(token.content) : token.content, token);
    }
  }
  raw_finder_.emplace(std::move(raw));
  normalized_finder_.emplace(std::move(normalized));
}

void Tokenizer::read_post_processor(const nlohmann::json& value, const std::string& where) {
  if (value.is_null()) return;
  const JsonObject json(value, where);
  const std::string type = json.string("type");
  if (type == "ByteLevel") return;  // changes offsets only
  if (type == "Sequence") {
    if (!json.at("processors").is_array()) json.refuse("processors", "a list");
    for (const auto& item : json.at("processors")) read_post_processor(item, where + ": processors");
    return;
  }
  if (type != "TemplateProcessing") json.refuse("type", "TemplateProcessing, ByteLevel, a Sequence of them, or null");
  if (!json.at("single").is_array()) json.refuse("single", "a list");
  const JsonObject tokens = json.object("special_tokens");
  bool seen_text = false;
  for (const auto& item : json.at("single")) {
    const JsonObject piece(item, where + ": single");
    if (piece.has("Sequence")) {
      if (seen_text) json.refuse("single", "one sequence");
      seen_text = true;
      continue;
    }
    const JsonObject special = tokens.object(piece.object("SpecialToken").string("id"));
    if (!special.at("ids").is_array()) special.refuse("ids", "a list");
    for (const auto& id : special.at("ids")) {
      if (!id.is_number_integer() || id.get<std::int64_t>() < 0 || id.get<std::int64_t>() > kMaxToken) special.refuse("ids", "tokens");
      (seen_text ? after_ : before_).push_back(id.get<std::int32_t>());
    }
  }
}

void Tokenizer::encode_text(std::string_view text, std::unordered_map<std::string, std::vector<std::int32_t>>& known,
                            std::vector<std::int32_t>& tokens) const {
  const std::string normalized = nfc_ ? normalize_nfc(std::string(text)) : std::string(text);
  for (const auto& part : normalized_finder_->split(normalized)) {
    if (part.token >= 0) {
      tokens.push_back(part.token);
      continue;
    }
    for (const auto& word : pre_tokenizer_({std::string(part.text)})) {
      if (word.empty()) continue;
      auto found = known.find(word);
      if (found == known.end()) {
        std::vector<std::int32_t> encoded;
        bpe_.encode(word, encoded);
        found = known.emplace(word, std::move(encoded)).first;
      }
      tokens.insert(tokens.end(), found->second.begin(), found->second.end());
    }
  }
}

std::vector<std::int32_t> Tokenizer::encode(std::string_view text, bool add_special_tokens) const {
  const std::string repaired = repair_utf8(text);
  std::vector<std::int32_t> tokens;
  std::unordered_map<std::string, std::vector<std::int32_t>> known;  // words repeat
  if (add_special_tokens) tokens = before_;
  for (const auto& part : raw_finder_->split(repaired)) {
    if (part.token >= 0) {
      tokens.push_back(part.token);
    } else {
      encode_text(part.text, known, tokens);
    }
  }
  if (add_special_tokens) tokens.insert(tokens.end(), after_.begin(), after_.end());
  return tokens;
}

std::string Tokenizer::decode(std::span<const std::int32_t> tokens, bool skip_special_tokens) const {
  std::string bytes;
  bool first = true;
  for (const std::int32_t token : tokens) {
    const auto found = contents_.find(token);
    if (found == contents_.end() || (skip_special_tokens && special_.contains(token))) continue;
    if (joins_with_spaces_) {
      bytes += (first ? "" : " ") + found->second;
    } else {
      bytes += bytes_of(found->second);
    }
    first = false;
  }
  return repair_utf8(bytes);
}

std::optional<std::int32_t> Tokenizer::token_to_id(std::string_view token) const {
  for (const auto& added : added_)
    if (added.content == token) return added.id;
  const auto found = bpe_.vocabulary().find(std::string(token));
  return found == bpe_.vocabulary().end() ? std::nullopt : std::optional(found->second);
}

}  // namespace veloxquant
