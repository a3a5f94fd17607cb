// Text to tokens and back, as Hugging Face's tokenizers do it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "veloxquant/text/added_tokens.h"
#include "veloxquant/text/bpe.h"
#include "veloxquant/text/decoder.h"
#include "veloxquant/text/normalizer.h"
#include "veloxquant/text/pre_tokenizer.h"
#include "veloxquant/text/text_encoder.h"

namespace veloxquant {

/// A tokenizer.json with a BPE model, byte-level (as GPT-2's, Qwen's, Llama 3's, Phi-2's) or of SentencePiece's kind (as Llama 2's,
/// Mistral's, Gemma's, Phi-3's), with added tokens and templates.  normalizer.h, pre_tokenizer.h and decoder.h list what may stand
/// around the model.  Immutable: may be used from many threads.
class Tokenizer : public TextEncoder {
 public:
  /// Reads `folder`/tokenizer.json.  Throws std::runtime_error that names file, field and value; parts that are not supported are
  /// refused by name.
  static Tokenizer load(const std::filesystem::path& folder);

  /// The text of such a file; `source` stands for its name in messages.  Throws likewise.
  static Tokenizer parse(std::string_view json, const std::string& source);

  /// Broken UTF-8 becomes U+FFFD first.
  std::vector<std::int32_t> encode(std::string_view text) const override { return encode(text, false); }

  /// `add_special_tokens` puts the template's tokens (such as a begin of text) around the text.
  std::vector<std::int32_t> encode(std::string_view text, bool add_special_tokens) const;

  /// The template's tokens before a text.  As in transformers 5, tokenizer.json alone decides: an add_bos_token in
  /// tokenizer_config.json says nothing where there is one.
  std::vector<std::int32_t> prefix() const override { return before_; }

  /// Tokens that do not exist are left out; bytes that are not UTF-8 become U+FFFD.
  std::string decode(std::span<const std::int32_t> tokens, bool skip_special_tokens = true) const;

  /// The highest id and one, added tokens and the template's included.
  int vocabulary_size() const { return vocabulary_size_; }

  std::optional<std::int32_t> token_to_id(std::string_view token) const;

 private:
  friend class TextStream;
  class WordEncoder;
  struct Content {
    std::string text;
    bool special = false;
  };

  explicit Tokenizer(const JsonObject& json);

  void read_added_tokens(const JsonObject& json);
  std::int32_t id_of_added(const std::string& content);
  void read_post_processor(const nlohmann::json& json, const std::string& where);
  void read_template(const JsonObject& json);
  void index_tokens(const std::string& where);
  void encode_text(Stretch text, WordEncoder& encoder, std::vector<std::int32_t>& tokens) const;

  Bpe bpe_;
  Normalizer normalizer_;
  PreTokenizer pre_tokenizer_;
  Decoder decoder_;
  std::map<std::int32_t, AddedToken> added_;
  std::unordered_map<std::string, std::int32_t> added_ids_;  // by content
  std::int32_t num_new_ = 0;                                 // added tokens that the vocabulary has not
  std::optional<AddedTokenFinder> raw_finder_, normalized_finder_;
  std::vector<std::int32_t> before_, after_;  // what the template puts around a text
  std::unordered_map<std::int32_t, Content> tokens_;
  int vocabulary_size_ = 0;
};

/// The text of tokens that come one by one, in time linear in their number.  What add() and finish() give, put together, is what
/// Tokenizer::decode() gives for them all; add() holds back what may still change, such as half a character.
class TextStream {
 public:
  /// `tokenizer` outlives it.
  explicit TextStream(const Tokenizer& tokenizer, bool skip_special_tokens = true);
  TextStream(const TextStream&) = delete;
  TextStream& operator=(const TextStream&) = delete;

  /// Valid UTF-8, often nothing.
  std::string add(std::int32_t token);

  /// The rest.  Nothing may follow.
  std::string finish();

 private:
  const Tokenizer* tokenizer_;
  bool skip_special_tokens_;
  std::string text_;  // not given yet
  std::unique_ptr<TokenSink> decoder_;
};

}  // namespace veloxquant
