#include "veloxquant/text/tokenizer.h"

#include <algorithm>
#include <unordered_set>
#include <utility>

#include "veloxquant/core/error.h"
#include "veloxquant/core/file.h"
#include "veloxquant/text/unicode.h"

namespace veloxquant {
namespace {

constexpr std::int64_t kMaxToken = (1 << 24) - 1;
constexpr std::size_t kMaxFileBytes = std::size_t{256} << 20;

const nlohmann::json& field_or_null(const JsonObject& json, const char* field) {
  static const nlohmann::json null;
  return json.has(field) ? json.at(field) : null;
}

}  // namespace

Tokenizer Tokenizer::load(const std::filesystem::path& folder) {
  const auto path = folder / "tokenizer.json";
  return parse(read_file(path, kMaxFileBytes), path.string());
}

Tokenizer Tokenizer::parse(std::string_view json, const std::string& source) {
  const auto document = parse_json(json, source);
  return Tokenizer(JsonObject(document, source));
}

Tokenizer::Tokenizer(const JsonObject& json)
    : bpe_(json.object("model")),
      normalizer_(read_normalizer(field_or_null(json, "normalizer"), json.where() + ": normalizer")),
      pre_tokenizer_(read_pre_tokenizer(field_or_null(json, "pre_tokenizer"), json.where() + ": pre_tokenizer")),
      decoder_(read_decoder(field_or_null(json, "decoder"), json.where() + ": decoder")) {
  if (json.string_or("version", "1.0") != "1.0") json.refuse("version", "1.0");
  read_added_tokens(json);
  read_post_processor(field_or_null(json, "post_processor"), json.where() + ": post_processor");
  index_tokens(json.where());
}

// As Hugging Face's tokenizers, which give an added token the id that its content has in the vocabulary or else the next free one;
// the id in the file is what that gave when it was written.
std::int32_t Tokenizer::id_of_added(const std::string& content) {
  if (const auto known = token_to_id(content)) return *known;
  const auto next = static_cast<std::int32_t>(bpe_.vocabulary().size()) + num_new_;
  ++num_new_;
  return next;
}

void Tokenizer::read_added_tokens(const JsonObject& json) {
  if (!json.has("added_tokens")) return;
  if (!json.at("added_tokens").is_array()) json.refuse("added_tokens", "a list");
  for (const auto& item : json.at("added_tokens")) {
    const JsonObject field(item, fmt::format("{}: added_tokens[{}]", json.where(), added_.size()));
    AddedToken token{.content = field.string("content"),
                     .special = field.boolean("special"),
                     .normalized = field.boolean("normalized"),
                     .single_word = field.boolean("single_word"),
                     .lstrip = field.boolean("lstrip"),
                     .rstrip = field.boolean("rstrip")};
    field.integer("id", 0, kMaxToken);
    if (token.content.empty()) continue;
    token.id = id_of_added(token.content);
    added_ids_[token.content] = token.id;
    added_[token.id] = std::move(token);
  }
}

void Tokenizer::index_tokens(const std::string& where) {
  std::unordered_set<std::string> specials;
  for (const auto& [id, token] : added_)
    if (token.special) specials.insert(token.content);
  std::map<std::int32_t, std::string> contents;
  for (const auto& [content, id] : bpe_.vocabulary()) contents[id] = content;
  std::vector<std::pair<std::string, AddedToken>> raw, normalized;
  for (const auto& [id, token] : added_) {
    contents[id] = token.normalized ? normalizer_({token.content}).text : token.content;
    // Hugging Face's tokenizers find such a token everywhere and cut the text there.
    if (contents[id].empty())
      throw_failure("tokenizer", "{}: added_tokens: the normalizer leaves nothing of \"{}\"", where, excerpt(token.content));
    (token.normalized ? normalized : raw).emplace_back(contents[id], token);
  }
  for (const auto& [id, content] : contents) tokens_[id] = {content, specials.contains(content)};
  vocabulary_size_ = contents.empty() ? 0 : contents.rbegin()->first + 1;
  for (const auto* around : {&before_, &after_})
    for (const std::int32_t id : *around) vocabulary_size_ = std::max(vocabulary_size_, id + 1);
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
  read_template(json);
}

// A later template goes around what an earlier one made.
void Tokenizer::read_template(const JsonObject& json) {
  const JsonObject tokens = json.object("special_tokens");
  std::vector<std::int32_t> before, after;
  int texts = 0;
  for (const auto& item : json.at("single")) {
    const JsonObject piece(item, json.where() + ": single");
    if (piece.has("Sequence")) {
      if (piece.object("Sequence").string("id") != "A" || ++texts > 1) json.refuse("single", "one sequence, A");
      continue;
    }
    const JsonObject special = tokens.object(piece.object("SpecialToken").string("id"));
    if (!special.at("ids").is_array()) special.refuse("ids", "a list");
    for (const auto& id : special.at("ids")) {
      if (!id.is_number_integer() || id.get<std::int64_t>() < 0 || id.get<std::int64_t>() > kMaxToken)
        special.refuse("ids", "tokens");
      (texts > 0 ? after : before).push_back(id.get<std::int32_t>());
    }
  }
  if (texts == 0) json.refuse("single", "one sequence, A");
  before_.insert(before_.begin(), before.begin(), before.end());
  after_.insert(after_.end(), after.begin(), after.end());
}

// Encodes words, each different short one once.
class Tokenizer::WordEncoder {
 public:
  explicit WordEncoder(const Bpe& bpe) : bpe_(bpe) {}

  void encode(std::string& word, std::vector<std::int32_t>& tokens) {
    if (word.size() > kLongestKnown) return bpe_.encode(word, tokens);
    const auto [entry, is_new] = known_.try_emplace(std::move(word));
    if (is_new) bpe_.encode(entry->first, entry->second);
    tokens.insert(tokens.end(), entry->second.begin(), entry->second.end());
  }

 private:
  static constexpr std::size_t kLongestKnown = 256;

  const Bpe& bpe_;
  std::unordered_map<std::string, std::vector<std::int32_t>> known_;
};

void Tokenizer::encode_text(Stretch text, WordEncoder& encoder, std::vector<std::int32_t>& tokens) const {
  const Stretch normalized = normalizer_(std::move(text));
  for (const auto& part : normalized_finder_->split(normalized.text)) {
    if (part.token >= 0) {
      tokens.push_back(part.token);
    } else {
      for (auto& word : pre_tokenizer_({slice(normalized, part.begin, part.end)})) encoder.encode(word.text, tokens);
    }
  }
}

std::vector<std::int32_t> Tokenizer::encode(std::string_view text, bool add_special_tokens) const {
  Stretch whole{repair_utf8(text)};
  if (!whole.text.empty()) next_character(whole.text, whole.origin);
  std::vector<std::int32_t> tokens;
  WordEncoder encoder(bpe_);
  if (add_special_tokens) tokens = before_;
  for (const auto& part : raw_finder_->split(whole.text)) {
    if (part.token >= 0) {
      tokens.push_back(part.token);
    } else {
      encode_text(slice(whole, part.begin, part.end), encoder, tokens);
    }
  }
  if (add_special_tokens) tokens.insert(tokens.end(), after_.begin(), after_.end());
  return tokens;
}

std::string Tokenizer::decode(std::span<const std::int32_t> tokens, bool skip_special_tokens) const {
  TextStream stream(*this, skip_special_tokens);
  std::string text;
  for (const std::int32_t token : tokens) text += stream.add(token);
  return text + stream.finish();
}

std::optional<std::int32_t> Tokenizer::token_to_id(std::string_view token) const {
  const std::string content(token);
  if (const auto added = added_ids_.find(content); added != added_ids_.end()) return added->second;
  const auto found = bpe_.vocabulary().find(content);
  return found == bpe_.vocabulary().end() ? std::nullopt : std::optional(found->second);
}

namespace {

class Collector : public TokenSink {
 public:
  explicit Collector(std::string& text) : text_(text) {}

  void write(std::string_view part) override { text_ += part; }
  void end_token() override {}
  void finish() override {}

 private:
  std::string& text_;
};

}  // namespace

TextStream::TextStream(const Tokenizer& tokenizer, bool skip_special_tokens)
    : tokenizer_(&tokenizer),
      skip_special_tokens_(skip_special_tokens),
      decoder_(tokenizer.decoder_(std::make_unique<Collector>(text_))) {}

std::string TextStream::add(std::int32_t token) {
  const auto found = tokenizer_->tokens_.find(token);
  if (found != tokenizer_->tokens_.end() && !(skip_special_tokens_ && found->second.special)) {
    decoder_->write(found->second.text);
    decoder_->end_token();
  }
  return std::exchange(text_, {});
}

std::string TextStream::finish() {
  decoder_->finish();
  return std::exchange(text_, {});
}

}  // namespace veloxquant
