#include "veloxquant/text/decoder.h"

#include <fmt/format.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "veloxquant/text/pre_tokenizer.h"
#include "veloxquant/text/regex.h"
#include "veloxquant/text/regex_syntax.h"
#include "veloxquant/text/unicode.h"

namespace veloxquant {
namespace {

constexpr const char* kSupported = "one of ByteLevel, ByteFallback, Fuse, Metaspace, Replace, Strip, Sequence, or null";
constexpr std::int64_t kMaxStrip = 1 << 20;

class Stage : public TokenSink {
 public:
  explicit Stage(std::unique_ptr<TokenSink> next) : next_(std::move(next)) {}

 protected:
  TokenSink& next() { return *next_; }

  void give(std::string_view token) {
    next_->write(token);
    next_->end_token();
  }

 private:
  std::unique_ptr<TokenSink> next_;
};

template <class T, class... Args>
Decoder stage(const Args&... args) {
  return [=](std::unique_ptr<TokenSink> next) { return std::make_unique<T>(std::move(next), args...); };
}

// One that has to see a token as a whole.
class WholeTokenStage : public Stage {
 public:
  using Stage::Stage;

  void write(std::string_view part) override { token_ += part; }

  void end_token() override {
    take(token_);
    token_.clear();
  }

  void finish() override { next().finish(); }

 protected:
  virtual void take(const std::string& token) = 0;

 private:
  std::string token_;
};

// All tokens as one.
class Fuse : public Stage {
 public:
  using Stage::Stage;

  void write(std::string_view part) override { next().write(part); }
  void end_token() override {}

  void finish() override {
    next().end_token();
    next().finish();
  }
};

class Spaced : public Fuse {
 public:
  using Fuse::Fuse;

  void write(std::string_view part) override {
    if (std::exchange(between_, false)) Fuse::write(" ");
    Fuse::write(part);
  }

  void end_token() override {
    if (std::exchange(between_, true)) Fuse::write(" ");  // behind an empty token
  }

 private:
  bool between_ = false;
};

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

class ByteLevel : public WholeTokenStage {
 public:
  using WholeTokenStage::WholeTokenStage;

  void finish() override {
    give(repair_utf8(waiting_));
    next().finish();
  }

 protected:
  void take(const std::string& token) override {
    waiting_ += byte_level_bytes(token);
    const std::size_t decided = waiting_.size() - incomplete_utf8(waiting_);
    next().write(repair_utf8(std::string_view(waiting_).substr(0, decided)));
    waiting_.erase(0, decided);
  }

 private:
  std::string waiting_;  // the begin of a character
};

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

// A run of bytes that is not UTF-8 as a whole is not read in part either, so that it has to end first.
class ByteFallback : public WholeTokenStage {
 public:
  using WholeTokenStage::WholeTokenStage;

  void finish() override {
    end_run();
    next().finish();
  }

 protected:
  void take(const std::string& token) override {
    if (const int byte = fallback_byte(token); byte >= 0) {
      run_ += static_cast<char>(byte);
      return;
    }
    end_run();
    give(token);
  }

 private:
  void end_run() {
    if (repair_utf8(run_) != run_) {
      for (std::size_t i = 0; i < run_.size(); ++i) give("\uFFFD");
    } else if (!run_.empty()) {
      give(run_);
    }
    run_.clear();
  }

  std::string run_;
};

class Replace : public WholeTokenStage {
 public:
  // `first`: in the first token.
  Replace(std::unique_ptr<TokenSink> next, Regex pattern, const std::string& first, const std::string& later)
      : WholeTokenStage(std::move(next)), pattern_(std::move(pattern)), content_(first), later_(later) {}

 protected:
  void take(const std::string& token) override {
    give(replace({token}, pattern_, content_).text);
    content_ = later_;
  }

 private:
  const Regex pattern_;
  std::string content_, later_;
};

Decoder read_metaspace_decoder(const JsonObject& json) {
  const Metaspace metaspace = read_metaspace(json);
  const Regex pattern(escape_regex(metaspace.replacement), json.where());
  const std::string first = metaspace.prepend != Metaspace::Prepend::kNever ? "" : " ", later = " ";
  return stage<Replace>(pattern, first, later);
}

Decoder read_replace(const JsonObject& json) {
  const std::string content = json.string("content");
  return stage<Replace>(read_pattern(json), content, content);
}

// Takes a character away up to `start` times at the begin of each token, then up to `stop` times at its end.
class Strip : public Stage {
 public:
  Strip(std::unique_ptr<TokenSink> next, const std::string& character, std::int64_t start, std::int64_t stop)
      : Stage(std::move(next)), character_(character), start_(start), stop_(static_cast<std::size_t>(stop)), at_start_(start) {}

  void write(std::string_view part) override {
    while (at_start_ > 0 && part.starts_with(character_)) part.remove_prefix(character_.size()), --at_start_;
    if (part.empty()) return;
    at_start_ = 0;
    std::string_view body = part;
    std::size_t ends = 0;
    for (; body.ends_with(character_); ++ends) body.remove_suffix(character_.size());
    // Of what has waited, and what ends this part, only the last may be taken away.
    if (!body.empty()) {
      give_waiting(0);
      next().write(body);
    }
    waiting_ += ends;
    give_waiting(stop_);
  }

  void end_token() override {
    waiting_ = 0;
    at_start_ = start_;
    next().end_token();
  }

  void finish() override { next().finish(); }

 private:
  // All but the last `kept`.
  void give_waiting(std::size_t kept) {
    for (; waiting_ > kept; --waiting_) next().write(character_);
  }

  const std::string character_;
  const std::int64_t start_;
  const std::size_t stop_;
  std::int64_t at_start_;     // so often still at the begin of this token
  std::size_t waiting_ = 0;  // so often just before
};

Decoder read_strip(const JsonObject& json) {
  return stage<Strip>(read_character(json, "content"), json.integer("start", 0, kMaxStrip), json.integer("stop", 0, kMaxStrip));
}

Decoder read_sequence(const JsonObject& json) {
  const auto& list = json.at("decoders");
  if (!list.is_array()) json.refuse("decoders", "a list");
  std::vector<Decoder> parts;
  for (const auto& item : list) parts.push_back(read_decoder(item, fmt::format("{}: decoders[{}]", json.where(), parts.size())));
  return [parts](std::unique_ptr<TokenSink> next) {
    for (auto part = parts.rbegin(); part != parts.rend(); ++part) next = (*part)(std::move(next));
    return next;
  };
}

}  // namespace

Decoder read_decoder(const nlohmann::json& value, const std::string& where) {
  if (value.is_null()) return stage<Spaced>();
  const JsonObject json(value, where);
  const std::string type = json.string("type");
  if (type == "ByteLevel") return stage<ByteLevel>();
  if (type == "ByteFallback") return stage<ByteFallback>();
  if (type == "Fuse") return stage<Fuse>();
  if (type == "Metaspace") return read_metaspace_decoder(json);
  if (type == "Replace") return read_replace(json);
  if (type == "Strip") return read_strip(json);
  if (type == "Sequence") return read_sequence(json);
  json.refuse("type", kSupported);
}

}  // namespace veloxquant
