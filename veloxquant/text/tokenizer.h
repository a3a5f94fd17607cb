// Text to tokens and back, as Hugging Face's tokenizers do it.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "veloxquant/text/added_tokens.h"
#include "veloxquant/text/bpe.h"
#include "veloxquant/text/pre_tokenizer.h"

namespace veloxquant {

/// A tokenizer.json of the byte-level BPE kind: NFC or no normaliser, pre-tokenizers Split, ByteLevel and Digits, added tokens, templates,
/// byte-level decoder.  Immutable: may be used from many threads.
class Tokenizer {
 public:
  /// Reads `folder`/tokenizer.json.  Throws std::runtime_error that names file, field and value; parts that are not supported are refused
  /// by name.
  static Tokenizer load(const std::filesystem::path& folder);

  /// Broken UTF-8 becomes U+FFFD first.  `add_special_tokens` puts the template's tokens (such as a begin of text) around the text.
  std::vector<std::int32_t> encode(std::string_view text, bool add_special_tokens = false) const;

  /// Tokens that do not exist are left out; bytes that are not UTF-8 together become U+FFFD.
  std::string decode(std::span<const std::int32_t> tokens, bool skip_special_tokens = true) const;

  /// The highest id and one, added tokens included.
  int vocabulary_size() const { return vocabulary_size_; }

  std::optional<std::int32_t> token_to_id(std::string_view token) const;

 private:
  explicit Tokenizer(const JsonObject& json);

  void read_added_tokens(const JsonObject& json);
  void read_post_processor(const nlohmann::json& json, const std::string& where);
  void encode_text(std::string_view text, std::unordered_map<std::string, std::vector<std::int32_t>>& known, std::vector<std::int32_t>& tokens) const;

  Bpe bpe_;
  bool nfc_ = false;
  PreTokenizer pre_tokenizer_;
  std::vector<AddedToken> added_;
  std::optional<AddedTokenFinder> raw_finder_, normalized_finder_;
  std::vector<std::int32_t> before_, after_;  // what the template puts around a text
  bool joins_with_spaces_ = false;            // without a decoder, tokens stand apart
  std::unordered_map<std::int32_t, std::string> contents_;
  std::unordered_set<std::int32_t> special_;
  int vocabulary_size_ = 0;
};

}  // namespace veloxquant
