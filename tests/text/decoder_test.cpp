// Compared with Hugging Face's tokenizers in tests/python/test_tokenizer.py; here is what they crash on or say in few words.
#include "veloxquant/text/decoder.h"

#include <gtest/gtest.h>

#include <utility>
#include <vector>

namespace veloxquant {
namespace {

using Tokens = std::vector<std::string>;

class Collector : public TokenSink {
 public:
  explicit Collector(Tokens& tokens) : tokens_(tokens) {}

  void write(std::string_view part) override { open_ += part; }
  void end_token() override { tokens_.push_back(std::exchange(open_, {})); }
  void finish() override { EXPECT_EQ(open_, ""); }

 private:
  Tokens& tokens_;
  std::string open_;
};

Tokens decode(const char* json, const Tokens& tokens) {
  Tokens decoded;
  const auto sink = read_decoder(nlohmann::json::parse(json), "here")(std::make_unique<Collector>(decoded));
  for (const auto& token : tokens) {
    sink->write(token);
    sink->end_token();
  }
  sink->finish();
  return decoded;
}

TEST(Decoder, BytesAreReadTogetherOrNotAtAll) {
  const char* json = R"({"type": "ByteFallback"})";
  EXPECT_EQ(decode(json, {"a", "<0xC3>", "<0xA9>", "b"}), (Tokens{"a", "é", "b"}));
  EXPECT_EQ(decode(json, {"<0x41>", "<0xC3>", "b", "<0x42>"}), (Tokens{"\uFFFD", "\uFFFD", "b", "B"}));
  EXPECT_EQ(decode(json, {"<0xed>", "<0xa0>", "<0x80>"}), (Tokens{"\uFFFD", "\uFFFD", "\uFFFD"}));
  EXPECT_EQ(decode(json, {"<0x1>", "<0xg0>", "<0x000>", "<0xé>"}), (Tokens{"<0x1>", "<0xg0>", "<0x000>", "<0xé>"}));
}

TEST(Decoder, StripTakesNoMoreThanThereIs) {
  const char* json = R"({"type": "Strip", "content": "é", "start": 2, "stop": 2})";
  EXPECT_EQ(decode(json, {"ééééé", "éxé", "éé", "é", "", "xé"}), (Tokens{"é", "x", "", "", "", "x"}));
}

TEST(Decoder, NoDecoderPutsSpacesBetween) {
  EXPECT_EQ(decode("null", {"a", "b", "c"}), Tokens{"a b c"});
  EXPECT_EQ(decode("null", {"", "b", "", ""}), Tokens{" b  "});
  EXPECT_EQ(decode("null", {}), Tokens{""});
  EXPECT_EQ(decode(R"({"type": "Sequence", "decoders": []})", {"a", "b"}), (Tokens{"a", "b"}));
}

}  // namespace
}  // namespace veloxquant
