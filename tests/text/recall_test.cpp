#include "veloxquant/text/recall.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <regex>
#include <set>
#include <stdexcept>
#include <string>

namespace veloxquant {
namespace {

constexpr int kContext = 700;

class RecallTest : public ::testing::Test {
 protected:
  // Filler of one token that no note holds, so that what is not filler can be told apart.
  RecallTest() : filler_(2000, tokenizer_.encode("~").at(0)) {}

  std::string text(std::span<const std::int32_t> tokens) const { return tokenizer_.decode(tokens); }

  const Tokenizer tokenizer_ = Tokenizer::load(std::filesystem::path(VELOXQUANT_SOURCE_DIR) / "examples" / "demo");
  const std::vector<std::int32_t> filler_;
};

TEST_F(RecallTest, EveryFactIsNotedOnceAndAskedForOnce) {
  std::set<std::size_t> counts;
  for (const auto& document : make_recall_documents(tokenizer_, filler_, 60, kContext, 1)) {
    ASSERT_EQ(document.tokens.size(), kContext + 1u);
    counts.insert(document.answers.size());
    std::set<std::string> noted, asked;
    const std::string whole = text(document.tokens);
    static const std::regex note(R"( \[Note: the ([a-z-]+(?: number)?) of ([A-Z][a-z]+\.? [A-Z][a-z]+) is (\d{5})\.\])");
    for (std::sregex_iterator it(whole.begin(), whole.end(), note), end; it != end; ++it)
      noted.insert(it->str(1) + "|" + it->str(2) + "|" + it->str(3));
    static const std::regex question(
        R"(\n\nQuestion: What is the ([a-z-]+(?: number)?) of ([A-Z][a-z]+\.? [A-Z][a-z]+)\? Answer: (\d{5})\.)");
    for (std::sregex_iterator it(whole.begin(), whole.end(), question), end; it != end; ++it)
      asked.insert(it->str(1) + "|" + it->str(2) + "|" + it->str(3));
    EXPECT_EQ(noted, asked);
    EXPECT_EQ(noted.size(), document.answers.size());
    // The questions stand at the end, each answer where `answers` says.
    static const std::regex answer(R"( \d{5}\.)");
    for (const auto& [begin, end] : document.answers) {
      const auto part = std::span(document.tokens).subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(end - begin));
      EXPECT_TRUE(std::regex_match(text(part), answer)) << text(part);
    }
    EXPECT_EQ(document.answers.back().second, kContext + 1);
    EXPECT_TRUE(std::is_sorted(document.answers.begin(), document.answers.end()));
  }
  EXPECT_EQ(counts, (std::set<std::size_t>{2, 3, 4, 5, 6}));
}

TEST_F(RecallTest, NotesInterruptAStretchOfTheFiller) {
  std::vector<std::int32_t> counting(2000);
  std::iota(counting.begin(), counting.end(), 5000);  // ids that the words of notes hardly use
  for (const auto& document : make_recall_documents(tokenizer_, counting, 20, kContext, 2)) {
    std::vector<std::int32_t> found;
    for (std::int32_t next = -1; const std::int32_t token : document.tokens) {
      if (next < 0 ? token == document.tokens[0] : token == next) {
        found.push_back(token);
        next = token + 1;
      }
    }
    const auto& [first_begin, first_end] = document.answers.front();
    EXPECT_GT(found.size(), 300u);
    EXPECT_LT(found.size(), static_cast<std::size_t>(first_begin));
    EXPECT_LT(first_begin, first_end);
  }
}

TEST_F(RecallTest, TheSeedDecidesAndMoreDocumentsDoNotChangeTheFirst) {
  const auto some = make_recall_documents(tokenizer_, filler_, 3, kContext, 7);
  const auto more = make_recall_documents(tokenizer_, filler_, 5, kContext, 7);
  const auto other = make_recall_documents(tokenizer_, filler_, 3, kContext, 8);
  for (std::size_t i = 0; i < some.size(); ++i) {
    EXPECT_EQ(some[i].tokens, more[i].tokens);
    EXPECT_EQ(some[i].answers, more[i].answers);
    EXPECT_NE(some[i].tokens, other[i].tokens);
  }
  EXPECT_NE(more[3].tokens, more[4].tokens);
}

// The number in the message is the least that works, down to the token.
TEST_F(RecallTest, TooSmallAContextSaysHowLargeItMustBe) {
  const auto make = [&](int context) { return make_recall_documents(tokenizer_, filler_, 4, context, 3); };
  for (const int context : {-5, 0, 20, 100}) {
    try {
      make(context);
      ADD_FAILURE() << context;
    } catch (const std::invalid_argument& error) {
      std::smatch match;
      const std::string message = error.what();
      ASSERT_TRUE(std::regex_search(message, match, std::regex("at least ([0-9]+) tokens"))) << message;
      const int least = std::stoi(match[1]);
      EXPECT_EQ(make(least).at(0).tokens.size(), static_cast<std::size_t>(least) + 1);
      EXPECT_THROW(make(least - 1), std::invalid_argument);
    }
  }
}

TEST_F(RecallTest, IsBoundedAndStopsWhenAsked) {
  for (const auto& [count, context] : {std::pair{100'001, kContext}, std::pair{100'000, 1 << 20}})
    EXPECT_THROW(make_recall_documents(tokenizer_, filler_, count, context, 1), std::invalid_argument) << count;
  std::size_t last = 0;
  const auto stop = [&](std::string_view, std::size_t done, std::size_t total) {
    EXPECT_EQ(total, 100'000u);
    last = done;
    if (done == 3) throw Interrupted();
  };
  EXPECT_THROW(make_recall_documents(tokenizer_, filler_, 100'000, kContext, 1, stop), Interrupted);
  EXPECT_EQ(last, 3u);
}

TEST_F(RecallTest, TooShortAFillerAndNoDocuments) {
  EXPECT_THROW(make_recall_documents(tokenizer_, {}, 1, kContext, 1), std::invalid_argument);
  EXPECT_THROW(make_recall_documents(tokenizer_, std::span(filler_).first(100), 1, kContext, 1), std::invalid_argument);
  EXPECT_THROW(make_recall_documents(tokenizer_, filler_, 0, kContext, 1), std::invalid_argument);
}

}  // namespace
}  // namespace veloxquant
