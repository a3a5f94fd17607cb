// Byte-pair encoding (arXiv 1508.07909).
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "veloxquant/core/json.h"

namespace veloxquant {

/// The `model` of a tokenizer.json of type BPE.
class Bpe {
 public:
  /// Throws std::runtime_error that names field and value: another type of model, dropout, prefixes and suffixes of words, ids that
  /// are taken twice, merges of tokens that do not exist.
  explicit Bpe(const JsonObject& json);

  /// Appends the tokens of one word, which must be valid UTF-8 and may be a whole text.  Characters that are not in the vocabulary
  /// become tokens of their bytes with byte_fallback, where it has all of those, else the unknown token, or nothing if none is
  /// named. Throws std::runtime_error if it is named and needed but not in the vocabulary itself.
  void encode(std::string_view word, std::vector<std::int32_t>& tokens) const;

  const std::unordered_map<std::string, std::int32_t>& vocabulary() const { return vocabulary_; }

 private:
  struct Merge {
    std::int32_t rank, token;
  };

  void read_vocabulary(const JsonObject& json);
  void read_merges(const JsonObject& json);
  void read_byte_tokens();
  std::vector<std::int32_t> characters(std::string_view word) const;
  bool append_bytes(std::string_view character, std::vector<std::int32_t>& tokens) const;
  std::int32_t unknown_token(std::string_view character) const;
  void merge(const std::vector<std::int32_t>& start, std::vector<std::int32_t>& tokens) const;

  std::unordered_map<std::string, std::int32_t> vocabulary_;
  std::unordered_map<std::uint64_t, Merge> merges_;  // by the pair of tokens
  std::string unknown_;  // empty: none; looked up when needed, since it may be missing where no character is unknown
  std::string where_;
  std::optional<std::array<std::int32_t, 256>> byte_tokens_;  // with byte_fallback; −1: not in the vocabulary
  bool fuse_unknown_ = false, ignore_merges_ = false;
};

}  // namespace veloxquant
