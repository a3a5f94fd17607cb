#include "veloxquant/text/unicode.h"

#include <gtest/gtest.h>

#include <string>

namespace veloxquant {
namespace {

TEST(Utf8, BrokenSequencesAreReplacedByMaximalPrefix) {
  // From Python: bytes.decode("utf-8", errors="replace")
  EXPECT_EQ(repair_utf8("ok"), "ok");
  EXPECT_EQ(repair_utf8("\xff"), "\uFFFD");
  EXPECT_EQ(repair_utf8("a\xc3"), "a\uFFFD");
  EXPECT_EQ(repair_utf8("\xc3("), "\uFFFD(");
  EXPECT_EQ(repair_utf8("\xe2\x82"), "\uFFFD");
  EXPECT_EQ(repair_utf8("\xf0\x9f\x98"), "\uFFFD");
  EXPECT_EQ(repair_utf8("\xf0\x9f\x98\xf0\x9f\x98\x80"), "\uFFFD\U0001F600");
  EXPECT_EQ(repair_utf8("\xed\xa0\x80"), "\uFFFD\uFFFD\uFFFD");  // a surrogate
  EXPECT_EQ(repair_utf8("\xc0\xaf"), "\uFFFD\uFFFD");            // too long a form
  EXPECT_EQ(repair_utf8("\xf4\x90\x80\x80"), "\uFFFD\uFFFD\uFFFD\uFFFD");
  EXPECT_EQ(repair_utf8(std::string_view("\0\x80", 2)), std::string("\0\uFFFD", 4));
}

TEST(Utf8, CharactersThatHaveOnlyBegun) {
  EXPECT_EQ(incomplete_utf8(""), 0u);
  EXPECT_EQ(incomplete_utf8("ok"), 0u);
  EXPECT_EQ(incomplete_utf8("é"), 0u);
  EXPECT_EQ(incomplete_utf8("a\xc3"), 1u);
  EXPECT_EQ(incomplete_utf8("\xe2\x82"), 2u);
  EXPECT_EQ(incomplete_utf8("\xf0\x9f\x98"), 3u);
  EXPECT_EQ(incomplete_utf8("\xf0\x9f\x98\x80"), 0u);
  EXPECT_EQ(incomplete_utf8("\xe0\x80"), 0u);  // too long a form: nothing makes it whole
  EXPECT_EQ(incomplete_utf8("\x80\x80"), 0u);
  EXPECT_EQ(incomplete_utf8("\xff"), 0u);
}

TEST(Utf8, EveryCharacterComesBack) {
  std::string text;
  for (char32_t c = 0; c < 0x110000; ++c) {
    if (c == 0xD800) c = 0xE000;
    append_utf8(c, text);
  }
  ASSERT_EQ(repair_utf8(text), text);
  std::size_t position = 0;
  for (char32_t c = 0; c < 0x110000; ++c) {
    if (c == 0xD800) c = 0xE000;
    ASSERT_EQ(next_character(text, position), c);
  }
  EXPECT_EQ(position, text.size());
}

TEST(Nfc, ComposesAndOrders) {
  EXPECT_EQ(normalize("plain", NormalForm::kNfc), "plain");
  EXPECT_EQ(normalize("e\u0301", NormalForm::kNfc), "\u00e9");
  EXPECT_EQ(normalize("s\u0307\u0323", NormalForm::kNfc), "\u1e69");
  EXPECT_EQ(normalize("a\u0301\u0323", NormalForm::kNfc), "\u1ea1\u0301");
  EXPECT_EQ(normalize("\u1112\u1161\u11ab", NormalForm::kNfc), "\ud55c");
  EXPECT_EQ(normalize("\u212b\u0958", NormalForm::kNfc), "\u00c5\u0915\u093c");  // singletons and exclusions stay apart
  EXPECT_EQ(normalize(std::string("e\u0301\0x", 5), NormalForm::kNfc), std::string("\u00e9\0x", 4));
  EXPECT_EQ(normalize("\u0301a", NormalForm::kNfc), "\u0301a");
  EXPECT_EQ(normalize("a\U0001E4EC\u0301", NormalForm::kNfc), "a\U0001E4EC\u0301");  // a mark since Unicode 15
}

TEST(NormalForms, DecomposeAndFold) {
  EXPECT_EQ(normalize("\u1e69", NormalForm::kNfd), "s\u0323\u0307");
  EXPECT_EQ(normalize("\ufb01\u00bd", NormalForm::kNfc), "\ufb01\u00bd");
  EXPECT_EQ(normalize("\ufb01\u00e9", NormalForm::kNfkc), "fi\u00e9");
  EXPECT_EQ(normalize("\ufb01\u00e9", NormalForm::kNfkd), "fie\u0301");
  EXPECT_EQ(normalize("\ufdfa", NormalForm::kNfkd).size(), 33u);  // the longest of all
  EXPECT_EQ(normalize("\u32ff", NormalForm::kNfkd), "\u32ff");    // since Unicode 12
}

TEST(Lowercase, OneByOne) {
  EXPECT_EQ(lowercase("ABC xyz 12"), "abc xyz 12");
  EXPECT_EQ(lowercase("\u0130\u03a3\u00c9\U00010d50"), "i\u0307\u03c3\u00e9\U00010d70");
}

TEST(Nfc, AMegabyteOfMarksInTheWrongOrder) {
  std::string text = "a", above, below;
  for (int i = 0; i < 250'000; ++i) {
    text += "\u0308\u0323";  // classes 230 and 220
    above += "\u0308";
    below += "\u0323";
  }
  EXPECT_EQ(normalize(text, NormalForm::kNfc), "\u1ea1" + below.substr(2) + above);
}

TEST(Characters, KindsThatTokenizersAskFor) {
  for (const char32_t c : {U' ', U'\n', U'\u0085', U'\u00a0', U'\u2028', U'\u3000'})
    EXPECT_TRUE(is_white_space(c)) << static_cast<int>(c);
  for (const char32_t c : {U'a', U'_', U'\u180e', U'\u200b', U'\ufeff', U'\0'})
    EXPECT_FALSE(is_white_space(c)) << static_cast<int>(c);
  for (const char32_t c : {U'a', U'_', U'7', U'é', U'\u0301', U'\u200d', U'Ⓐ', U'\U000323AF'}) EXPECT_TRUE(is_word_character(c));
  for (const char32_t c : {U'-', U' ', U'²', U'½', U'€', U'\u200b'}) EXPECT_FALSE(is_word_character(c)) << static_cast<int>(c);
}

}  // namespace
}  // namespace veloxquant
