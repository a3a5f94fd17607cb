#include "veloxquant/text/recall.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <regex>
#include <set>
#include <stdexcept>
#include <string>

#include "veloxquant/core/hash.h"
#include "veloxquant/text/tokenizer.h"

namespace veloxquant {
namespace {

constexpr int kContext = 700;

class RecallTest : public ::testing::Test {
 protected:
  // Filler of one token that no note holds, so that what is not filler can be told apart.
  RecallTest() : filler_(2000, tokenizer_.encode("~").at(0)) {}

  std::string text(std::span<const std::int32_t> tokens) const { return tokenizer_.decode(tokens); }

  static std::span<const std::int32_t> part(std::span<const std::int32_t> tokens, std::pair<int, int> span) {
    return tokens.subspan(static_cast<std::size_t>(span.first), static_cast<std::size_t>(span.second - span.first));
  }

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
    for (const auto& span : document.answers)
      EXPECT_TRUE(std::regex_match(text(part(document.tokens, span)), answer)) << text(part(document.tokens, span));
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
  EXPECT_THROW(make_recall_documents(tokenizer_, filler_, 100'000, kContext, 1, Wording::kFirst, stop), Interrupted);
  EXPECT_EQ(last, 3u);
}

TEST_F(RecallTest, TooShortAFillerAndNoDocuments) {
  EXPECT_THROW(make_recall_documents(tokenizer_, {}, 1, kContext, 1), std::invalid_argument);
  EXPECT_THROW(make_recall_documents(tokenizer_, std::span(filler_).first(100), 1, kContext, 1), std::invalid_argument);
  EXPECT_THROW(make_recall_documents(tokenizer_, filler_, 0, kContext, 1), std::invalid_argument);
}

// A report of today can be compared with those of former versions.
TEST_F(RecallTest, DocumentsOfTheFirstWordingStayWhatTheyWere) {
  std::vector<std::int32_t> counting(3000);
  std::iota(counting.begin(), counting.end(), 1000);
  std::string all;
  for (const std::uint64_t seed : {0, 1, 77}) {
    for (const auto& document : make_recall_documents(tokenizer_, counting, 12, kContext, seed)) {
      for (const auto token : document.tokens) all += std::to_string(token) + " ";
      for (const auto& [begin, end] : document.answers) all += std::to_string(begin) + "-" + std::to_string(end) + " ";
    }
  }
  EXPECT_EQ(sha256(all), "ff1a6f21b5363d81c57cd0cd314d36ad955d97db131776bbd1b31bb827b3b8f1");
}

TEST_F(RecallTest, TheSecondWordingIsAnotherOne) {
  static const std::regex note(R"( \[Note: the ([a-z ]+) of ([A-Z][a-z]+\.? [A-Z][a-z]+) was (\d{5})\.\])");
  static const std::regex answer(R"( \d{5}\.)");
  for (const auto& document : make_recall_documents(tokenizer_, filler_, 40, kContext, 5, Wording::kSecond)) {
    ASSERT_EQ(document.tokens.size(), kContext + 1u);
    const std::string whole = text(document.tokens);
    std::size_t notes = 0;
    for (std::sregex_iterator it(whole.begin(), whole.end(), note), end; it != end; ++it, ++notes) {
      const std::string asked = "Tell me the " + it->str(1) + " of " + it->str(2) + ". Answer: " + it->str(3) + ".";
      EXPECT_NE(whole.find("\n\nQuestion: " + asked), std::string::npos) << asked;
    }
    EXPECT_EQ(notes, document.answers.size());
    for (const auto& span : document.answers) EXPECT_TRUE(std::regex_match(text(part(document.tokens, span)), answer));
    for (const char* first : {"What is", "pass-word", "room number"}) EXPECT_EQ(whole.find(first), std::string::npos);
  }
}

TEST_F(RecallTest, FactSamplesAskForWhatTheyNoted) {
  constexpr int kLength = 1024, kCount = 60;
  const auto made = make_fact_samples(tokenizer_, filler_, kCount, kLength, 3);
  ASSERT_EQ(made.samples.count, kCount);
  ASSERT_EQ(made.samples.length, kLength);
  ASSERT_EQ(made.answers.size(), static_cast<std::size_t>(kCount));
  std::size_t short_answers = 0, whole_notes = 0;
  for (int i = 0; i < kCount; ++i) {
    const auto tokens = made.samples.row(i);
    const auto& answers = made.answers[static_cast<std::size_t>(i)];
    ASSERT_GE(answers.size(), 2u);
    EXPECT_LE(answers.size(), 2u * kLength / 150);
    EXPECT_EQ(answers.back().second, kLength);
    const std::string before = text(tokens.first(static_cast<std::size_t>(answers.front().first)));
    for (const auto& span : answers) {
      const std::string answer = text(part(tokens, span));
      if (const auto at = before.find(answer); answer.size() > 25) {
        ++whole_notes;
        EXPECT_NE(at, std::string::npos) << answer;
      } else {
        ++short_answers;
        static const std::regex value(R"( (\d{2,6}|[a-z]+|[A-Z]\d-\d\d)(\.|,"| </fact>|\n))");
        std::smatch match;
        ASSERT_TRUE(std::regex_match(answer, match, value)) << answer;
        EXPECT_NE(before.find(match.str(1)), std::string::npos) << answer;
      }
    }
  }
  EXPECT_GT(whole_notes, 30u);
  EXPECT_GT(short_answers, 3 * whole_notes / 2);
}

TEST_F(RecallTest, CalibrationSharesNothingWithEvaluation) {
  const auto made = make_fact_samples(tokenizer_, filler_, 300, 1024, 4);
  const std::string all = text(made.samples.tokens);
  std::set<std::string> forbidden = {"[Note", "Question", "Answer", "What is the", "Tell me"};
  for (const Wording wording : {Wording::kFirst, Wording::kSecond}) {
    const auto& of = evaluation_wording(wording);
    for (const auto words : {of.titles, of.names, of.things}) forbidden.insert(words.begin(), words.end());
  }
  for (const auto& word : forbidden) {
    const std::string literal = std::regex_replace(word, std::regex(R"([\[.])"), R"(\$&)");
    EXPECT_FALSE(std::regex_search(all, std::regex("(^|[^A-Za-z])" + literal + "(?![A-Za-z])"))) << word;
  }
  EXPECT_EQ(all.find("[Note"), std::string::npos);
  // Every wording comes up.
  for (const char* some : {"was put down as", "Memo", "<fact id=", " = ", "Mind you", "reports"})
    EXPECT_NE(all.find(some), std::string::npos);
}

TEST_F(RecallTest, FactSamplesFollowTheSeedAndHoldMoreFactsWhereTheyAreLonger) {
  const auto some = make_fact_samples(tokenizer_, filler_, 6, 512, 7), more = make_fact_samples(tokenizer_, filler_, 12, 512, 7),
             other = make_fact_samples(tokenizer_, filler_, 6, 512, 8);
  for (int i = 0; i < 6; ++i) {
    EXPECT_TRUE(std::ranges::equal(some.samples.row(i), more.samples.row(i)));
    EXPECT_FALSE(std::ranges::equal(some.samples.row(i), other.samples.row(i)));
  }
  EXPECT_TRUE(std::equal(some.answers.begin(), some.answers.end(), more.answers.begin()));
  const std::vector<std::int32_t> long_filler(40'000, filler_[0]);
  for (const auto& answers : make_fact_samples(tokenizer_, long_filler, 12, 32'768, 7).answers) {
    EXPECT_GE(answers.size(), 32'768u / 400);
    EXPECT_LE(answers.size(), 2 * 32'768u / 150);
  }
}

TEST_F(RecallTest, FactSamplesSayWhatTheyNeed) {
  const auto make = [&](int length) { return make_fact_samples(tokenizer_, filler_, 12, length, 3); };
  for (const int length : {-5, 0, 20, 40}) {
    try {
      make(length);
      ADD_FAILURE() << length;
    } catch (const std::invalid_argument& error) {
      std::smatch match;
      const std::string message = error.what();
      ASSERT_TRUE(std::regex_search(message, match, std::regex("length: expected at least ([0-9]+) tokens"))) << message;
      const int least = std::stoi(match[1]);
      EXPECT_LT(least, 150);
      EXPECT_EQ(make(least).samples.length, least);
      EXPECT_THROW(make(least - 1), std::invalid_argument);
    }
  }
  EXPECT_THROW(make_fact_samples(tokenizer_, {}, 1, 512, 1), std::invalid_argument);
  EXPECT_THROW(make_fact_samples(tokenizer_, std::span(filler_).first(100), 1, 512, 1), std::invalid_argument);
  EXPECT_THROW(make_fact_samples(tokenizer_, filler_, 0, 512, 1), std::invalid_argument);
  EXPECT_THROW(make_fact_samples(tokenizer_, filler_, 100'001, 512, 1), std::invalid_argument);
  EXPECT_THROW(make_fact_samples(tokenizer_, filler_, 100'000, 1 << 20, 1), std::invalid_argument);
}

class WithPrefix : public TextEncoder {
 public:
  explicit WithPrefix(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}
  std::vector<std::int32_t> encode(std::string_view text) const override { return tokenizer_.encode(text); }
  std::vector<std::int32_t> prefix() const override { return {7, 3}; }

 private:
  const Tokenizer& tokenizer_;
};

// Once, at the begin; the facts are the same as without, behind it.
TEST_F(RecallTest, DocumentsBeginWithThePrefix) {
  const WithPrefix prefixed(tokenizer_);
  const auto check = [&](std::span<const std::int32_t> tokens, const AnswerSpans& answers, std::span<const std::int32_t> bare,
                         const AnswerSpans& bare_answers) {
    EXPECT_EQ(tokens.size(), bare.size());
    EXPECT_EQ(tokens[0], 7);
    EXPECT_EQ(tokens[1], 3);
    EXPECT_NE(tokens[2], 7);
    ASSERT_EQ(answers.size(), bare_answers.size());
    for (std::size_t a = 0; a < answers.size(); ++a) EXPECT_EQ(text(part(tokens, answers[a])), text(part(bare, bare_answers[a])));
    EXPECT_EQ(answers.back().second, static_cast<int>(tokens.size()));
  };
  const auto documents = make_recall_documents(prefixed, filler_, 5, kContext, 1),
             without = make_recall_documents(tokenizer_, filler_, 5, kContext, 1);
  for (std::size_t i = 0; i < 5; ++i) check(documents[i].tokens, documents[i].answers, without[i].tokens, without[i].answers);
  const auto made = make_fact_samples(prefixed, filler_, 6, 600, 1);
  for (int i = 0; i < 6; ++i) {
    EXPECT_EQ(made.samples.row(i)[0], 7);
    EXPECT_EQ(made.samples.row(i)[1], 3);
    EXPECT_EQ(made.answers[static_cast<std::size_t>(i)].back().second, 600);
  }
}

}  // namespace
}  // namespace veloxquant
