#include "veloxquant/text/decoder.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <cstdint>
#include <utility>

#include "veloxquant/text/pre_tokenizer.h"
#include "veloxquant/text/regex.h"
#include "veloxquant/text/regex_syntax.h"
#include "veloxquant/text/unicode.h"

namespace veloxquant {
namespace {

using Tokens = std::vector<std::string>;

constexpr const char* kSupported = "one of ByteLevel, ByteFallback, Fuse, Metaspace, Replace, Strip, Sequence, or null";
constexpr std::int64_t kMaxStrip = 1 << 20;

Tokens fuse(const Tokens& tokens) {
  return {fmt::format("{}", fmt::join(tokens, ""))};
}

Tokens spaced(const Tokens& tokens) {
  return {fmt::format("{}", fmt::join(tokens, " "))};
}

// The bytes of a token; one with characters that stand for no byte is taken as it is.
std::string byte_level_bytes(const std::string& token) {
  std::string bytes;
  for (std::size_t position = 0; position < token.size();) {
    const int byte = byte_level_byte(next_character(token, position));
    if (byte < 0) return token;
    bytes += static_cast<char>(byte);
  }
  return bytes;
}

Tokens byte_level(const Tokens& tokens) {
  std::string bytes;
  for (const auto& token : tokens) bytes += byte_level_bytes(token);
  return {repair_utf8(bytes)};
}

int hex_digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  const char lower = static_cast<char>(c | 0x20);
  return lower >= 'a' && lower <= 'f' ? lower - 'a' + 10 : -1;
}

// The byte that a token such as <0x0A> is, or −1.  Rust, which Hugging Face's tokenizers parse it with, takes +A for 0A.
int fallback_byte(std::string_view token) {
  if (token.size() != 6 || !token.starts_with("<0x") || !token.ends_with('>')) return -1;
  const int high = token[3] == '+' ? 0 : hex_digit(token[3]), low = hex_digit(token[4]);
  return high < 0 || low < 0 ? -1 : high * 16 + low;
}

// A run of bytes that is not UTF-8 as a whole is not read in part either.
Tokens byte_fallback(Tokens tokens) {
  Tokens result;
  std::string bytes;
  const auto flush = [&] {
    if (repair_utf8(bytes) == bytes) {
      result.push_back(bytes);
    } else {
      result.insert(result.end(), bytes.size(), "\uFFFD");
    }
    bytes.clear();
  };
  for (auto& token : tokens) {
    if (const int byte = fallback_byte(token); byte >= 0) {
      bytes += static_cast<char>(byte);
      continue;
    }
    if (!bytes.empty()) flush();
    result.push_back(std::move(token));
  }
  if (!bytes.empty()) flush();
  return result;
}

Decoder read_metaspace_decoder(const JsonObject& json) {
  const Metaspace metaspace = read_metaspace(json);
  const Regex pattern(escape_regex(metaspace.replacement), json.where());
  return [pattern, prepends = metaspace.prepend != Metaspace::Prepend::kNever](Tokens tokens) {
    for (std::size_t i = 0; i < tokens.size(); ++i)
      tokens[i] = replace({std::move(tokens[i])}, pattern, i == 0 && prepends ? "" : " ").text;
    return tokens;
  };
}

Decoder read_replace(const JsonObject& json) {
  return [pattern = read_pattern(json), content = json.string("content")](Tokens tokens) {
    for (auto& token : tokens) token = replace({std::move(token)}, pattern, content).text;
    return tokens;
  };
}

Decoder read_strip(const JsonObject& json) {
  const std::string content = read_character(json, "content");
  const auto start = json.integer("start", 0, kMaxStrip), stop = json.integer("stop", 0, kMaxStrip);
  return [content, start, stop](Tokens tokens) {
    for (auto& token : tokens) {
      std::string_view rest = token;
      for (auto i = start; i > 0 && rest.starts_with(content); --i) rest.remove_prefix(content.size());
      for (auto i = stop; i > 0 && rest.ends_with(content); --i) rest.remove_suffix(content.size());
      token = std::string(rest);
    }
    return tokens;
  };
}

Decoder read_sequence(const JsonObject& json) {
  const auto& list = json.at("decoders");
  if (!list.is_array()) json.refuse("decoders", "a list");
  std::vector<Decoder> parts;
  for (const auto& item : list) parts.push_back(read_decoder(item, fmt::format("{}: decoders[{}]", json.where(), parts.size())));
  return [parts](Tokens tokens) {
    for (const auto& part : parts) tokens = part(std::move(tokens));
    return tokens;
  };
}

}  // namespace

Decoder read_decoder(const nlohmann::json& value, const std::string& where) {
  if (value.is_null()) return spaced;
  const JsonObject json(value, where);
  const std::string type = json.string("type");
  if (type == "ByteLevel") return byte_level;
  if (type == "ByteFallback") return byte_fallback;
  if (type == "Fuse") return fuse;
  if (type == "Metaspace") return read_metaspace_decoder(json);
  if (type == "Replace") return read_replace(json);
  if (type == "Strip") return read_strip(json);
  if (type == "Sequence") return read_sequence(json);
  json.refuse("type", kSupported);
}

}  // namespace veloxquant
