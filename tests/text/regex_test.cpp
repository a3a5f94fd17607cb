#include "veloxquant/text/regex.h"

#include <gtest/gtest.h>

#include <stdexcept>
#include <string>

#include "veloxquant/text/regex_syntax.h"

namespace veloxquant {
namespace {

std::vector<std::string> words(std::string_view pattern, std::string_view text) {
  std::vector<std::string> result;
  for (const auto& match : Regex(pattern, "here").find_all(text))
    result.emplace_back(text.substr(match.begin, match.end - match.begin));
  return result;
}

using Words = std::vector<std::string>;

TEST(Regex, FindsFromLeftToRight) {
  EXPECT_EQ(words(R"(\p{L}+|\p{N})", "añb 12"), (Words{"añb", "1", "2"}));
  EXPECT_EQ(words(R"((?i:'s|'ll)|\p{L}+)", "it'S we'll"), (Words{"it", "'S", "we", "'ll"}));
  EXPECT_EQ(words("x", ""), Words{});
}

// An empty match at the end of the one before would never end.
TEST(Regex, EmptyMatches) {
  EXPECT_EQ(Regex("(?=é)", "here").find_all("xéé"), (std::vector<Match>{{1, 1}, {3, 3}}));
  EXPECT_EQ(Regex("a*", "here").find_all("baac"), (std::vector<Match>{{0, 0}, {1, 3}, {4, 4}}));
  EXPECT_EQ(Regex("", "here").find_all("é"), (std::vector<Match>{{0, 0}, {2, 2}}));
}

TEST(Regex, WhatOnigurumaMeansOtherwise) {
  EXPECT_EQ(words(R"(\s)", "\u180e\u0085\u200b"), Words{"\u0085"});
  EXPECT_EQ(words(R"([^\S])", "\u180e\u0085\u200b"), Words{"\u0085"});
  EXPECT_EQ(words(R"(\w+)", "e\u0301_½ ⅓"), Words{"e\u0301_½"});
  EXPECT_EQ(words(R"(\h+)", "x1F g"), Words{"1F"});
  EXPECT_EQ(words(R"(\v)", "\n\x0b"), Words{"\x0b"});
  EXPECT_EQ(words(R"(\p{Han}+)", "一、二"), (Words{"一", "二"}));
  EXPECT_EQ(words(R"(\p{L}+)", "\U00031350\U0002EBF0"), Words{"\U00031350\U0002EBF0"});  // since Unicode 15 and 15.1
  EXPECT_EQ(words("^a$", "b\na\nb"), Words{"a"});
  EXPECT_EQ(words("(?m:a.)", "a\n"), Words{"a\n"});
  EXPECT_EQ(words("a{,2}b", "aaab"), Words{"aab"});
  EXPECT_EQ(words(R"(\u00e9|\x61|\x{1f642})", "éa🙂"), (Words{"é", "a", "🙂"}));
  EXPECT_EQ(words("[]a{]+", "a]{}"), Words{"a]{"});
  EXPECT_EQ(words(R"([\w-]+)", "a-b c"), (Words{"a-b", "c"}));
}

TEST(Regex, LiteralsAreEscaped) {
  std::string ascii;
  for (char c = 0; c < 0x7f; ++c) ascii += c;
  for (const std::string& literal : {ascii, std::string("é[🙂]")})
    EXPECT_EQ(words(escape_regex(literal), "x" + literal), Words{literal});
}

TEST(Regex, WhatWouldBeReadDifferentlyIsRefusedByName) {
  for (const char* pattern : {"a{1,2}+",
                              "a{2}?",
                              "[a[b]]",
                              "[a&&b]",
                              "[\\D]",
                              "[\\P{L}]",
                              "[\\W]",
                              "[a-\\s]",
                              "[[:alpha:]]",
                              "(?<n>a)",
                              "(?x)a",
                              "a(?i)b",
                              "(*UTF)a",
                              "\\Qa",
                              "(a)\\1",
                              "\\",
                              "\\p",
                              "\\pL",
                              "\\p{",
                              "\\p{}",
                              "\\p{No such script}",
                              "\\p{Nosuchscript}",
                              "\\u12",
                              "\\xe9",
                              "\\x",
                              "\\x{",
                              "\\x{}",
                              "\\x{110000}",
                              "[",
                              "[a",
                              "(",
                              ")",
                              "a**",
                              "*",
                              "[b-a]",
                              "(?",
                              "[\\"}) {
    try {
      Regex(pattern, "somewhere.json");
      ADD_FAILURE() << pattern;
    } catch (const std::runtime_error& error) {
      const std::string message = error.what();
      EXPECT_NE(message.find("somewhere.json"), std::string::npos) << message;
      EXPECT_NE(message.find(pattern), std::string::npos) << message;
      EXPECT_EQ(message.find('\n'), std::string::npos) << message;
    }
  }
}

// A pattern comes from a file and may be endless; a message shows its beginning.
TEST(Regex, ErrorsShowLittleOfThePattern) {
  std::string many = "a";
  for (int i = 0; i < 100'000; ++i) many += "é";
  const std::string text(10'000, 'a');
  for (const std::string& pattern : {many + "(?&x)", many + "[z-a]", "(a+)+b|(a|aa)+c|" + many}) {
    try {
      Regex(pattern, "x").find_all(text);
      ADD_FAILURE();
    } catch (const std::runtime_error& error) {
      const std::string message = error.what();
      EXPECT_NE(message.find("…\""), std::string::npos) << message.substr(0, 300);
      EXPECT_LT(message.size(), 300u);
    }
  }
}

TEST(Regex, BacktrackingEnds) {
  const std::string text(10'000, 'a');
  EXPECT_THROW(Regex("(a+)+b|(a|aa)+c", "here").find_all(text), std::runtime_error);
}

TEST(Regex, AMegabyteInOneMatch) {
  const std::string text(1 << 20, 'a');
  for (const char* pattern : {"a+", "(a|b)+", "(?:a|b)+", R"([^\s\p{N}]+)", "(?:aa?)+"})
    EXPECT_EQ(Regex(pattern, "here").find_all(text), (std::vector<Match>{{0, text.size()}})) << pattern;
}

}  // namespace
}  // namespace veloxquant
