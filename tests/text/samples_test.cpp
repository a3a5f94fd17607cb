#include "veloxquant/text/samples.h"

#include <gtest/gtest.h>

#include <numeric>
#include <stdexcept>
#include <string>

namespace veloxquant {
namespace {

std::vector<std::int32_t> counting(int first, int count) {
  std::vector<std::int32_t> tokens(static_cast<std::size_t>(count));
  std::iota(tokens.begin(), tokens.end(), first);
  return tokens;
}

std::string message_of(const auto& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "nothing thrown";
}

TEST(Samples, AreWindowsAtEvenDistancesOverAllTexts) {
  // windows of 3: 0 3 6 | none | 100 103, the rests 9 and 106 left out
  const std::vector<std::vector<std::int32_t>> texts = {counting(0, 10), counting(50, 2), {}, counting(100, 7)};
  const auto firsts = [&](int num_samples) {
    const TokenBatch batch = cut_samples(texts, num_samples, 3);
    EXPECT_EQ(batch.count, num_samples);
    std::vector<int> result;
    for (int i = 0; i < batch.count; ++i) {
      const auto row = batch.row(i);
      EXPECT_EQ(row.size(), 3u);
      EXPECT_EQ(row[2], row[0] + 2);
      result.push_back(row[0]);
    }
    return result;
  };
  EXPECT_EQ(firsts(5), (std::vector{0, 3, 6, 100, 103}));
  EXPECT_EQ(firsts(1), (std::vector{0}));
  EXPECT_EQ(firsts(2), (std::vector{0, 6}));
  EXPECT_EQ(firsts(3), (std::vector{0, 3, 100}));
}

TEST(Samples, TooFewWindowsSayWhatIsPossible) {
  const std::vector<std::vector<std::int32_t>> texts = {counting(0, 10), counting(0, 7)};
  const std::string message = message_of([&] { cut_samples(texts, 6, 3); });
  EXPECT_NE(message.find("need 18 tokens"), std::string::npos) << message;
  EXPECT_NE(message.find("it has 17"), std::string::npos) << message;
  EXPECT_NE(message.find("at most 5 samples"), std::string::npos) << message;
  EXPECT_NE(message.find("length of at most 2 for"), std::string::npos) << message;
  EXPECT_EQ(message.find('\n'), std::string::npos);
}

TEST(Samples, WhatTheMessageCallsPossibleIsPossible) {
  for (int size = 1; size < 40; ++size) {
    const std::vector<std::vector<std::int32_t>> texts = {counting(0, size), counting(0, 11)};
    for (int samples = 1; samples < 30; ++samples) {
      int longest = 0;
      for (int length = 1; length <= 40; ++length)
        if (message_of([&] { cut_samples(texts, samples, length); }) == "nothing thrown") longest = length;
      const std::string message = message_of([&] { cut_samples(texts, samples, 50); });
      EXPECT_NE(message.find("length of at most " + std::to_string(longest) + " "), std::string::npos) << message;
    }
  }
}

TEST(Samples, NumbersBelowOneAreRefused) {
  const std::vector<std::vector<std::int32_t>> texts = {counting(0, 10)};
  EXPECT_THROW(cut_samples(texts, 0, 3), std::invalid_argument);
  EXPECT_THROW(cut_samples(texts, -1, 3), std::invalid_argument);
  EXPECT_THROW(cut_samples(texts, 1, 0), std::invalid_argument);
  EXPECT_THROW(cut_samples({}, 1, 1), std::invalid_argument);
  EXPECT_THROW(cut_samples(texts, 2147483647, 2147483647), std::invalid_argument);
}

TEST(Samples, BatchesAreBounded) {
  EXPECT_EQ(message_of([] { TokenBatch(1 << 30, 512); }),
            "[samples] expected at most 524288 sequences of 512 tokens, got 1073741824");
  EXPECT_EQ(message_of([] { check_batch_size(524288, 512); }), "nothing thrown");
  EXPECT_EQ(TokenBatch(3, 2).tokens, std::vector<std::int32_t>(6, 0));
}

TEST(Samples, LeadingWindowsAreTheFirst) {
  const auto text = counting(0, 11);
  EXPECT_EQ(leading_windows(text, 2, 4).tokens, counting(0, 8));
  EXPECT_EQ(leading_windows(text, 0, 4).tokens, counting(0, 8));
  EXPECT_EQ(leading_windows(text, 0, 4).count, 2);
  EXPECT_EQ(leading_windows(text, 1, 11).tokens, text);
  EXPECT_THROW(leading_windows(text, 3, 4), std::invalid_argument);
  EXPECT_THROW(leading_windows(text, 0, 12), std::invalid_argument);
  EXPECT_THROW(leading_windows(text, -1, 4), std::invalid_argument);
  EXPECT_THROW(leading_windows(text, 1, -4), std::invalid_argument);
}

// A begin of text stands in every window, and takes the place of a token of the text.
TEST(Samples, BeginWithThePrefix) {
  const std::vector<std::int32_t> prefix = {-1, -2};
  EXPECT_EQ(leading_windows(counting(0, 8), 0, 5, prefix).tokens, (std::vector{-1, -2, 0, 1, 2, -1, -2, 3, 4, 5}));
  EXPECT_EQ(leading_windows(counting(0, 8), 1, 10, prefix).tokens.size(), 10u);
  EXPECT_EQ(cut_samples({counting(0, 4), counting(10, 3)}, 2, 5, prefix).tokens,
            (std::vector{-1, -2, 0, 1, 2, -1, -2, 10, 11, 12}));
  EXPECT_EQ(message_of([&] { leading_windows(counting(0, 8), 1, 2, prefix); }),
            "[samples] length: expected more than the 2 tokens that the tokenizer puts before a text, got 2");
  const std::string message = message_of([&] { cut_samples({counting(0, 7)}, 2, 6, prefix); });
  EXPECT_NE(message.find("2 samples of 6 tokens need 8 tokens without overlap, it has 7"), std::string::npos) << message;
  EXPECT_NE(message.find("length of at most 5 for"), std::string::npos) << message;
  EXPECT_EQ(cut_samples({counting(0, 7)}, 2, 5, prefix).count, 2);
}

TEST(Samples, TextOfWindowsIsWithoutTheirPrefix) {
  const std::vector<std::int32_t> prefix = {-1, -2};
  EXPECT_EQ(text_of(leading_windows(counting(0, 9), 0, 5, prefix), prefix), counting(0, 9));
  EXPECT_EQ(text_of(leading_windows(counting(0, 9), 0, 3), prefix), counting(0, 9));  // none has it
  EXPECT_EQ(text_of(leading_windows(counting(0, 9), 0, 1), prefix), counting(0, 9));  // shorter than it
}

}  // namespace
}  // namespace veloxquant
