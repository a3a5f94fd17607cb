#include "veloxquant/text/stretch.h"

#include <gtest/gtest.h>

namespace veloxquant {
namespace {

void expect(const Stretch& stretch, const std::string& text, std::size_t origin) {
  EXPECT_EQ(stretch.text, text);
  EXPECT_EQ(stretch.origin, origin);
}

TEST(Stretch, Slices) {
  const Stretch stretch{"abcdef", 2};
  expect(slice(stretch, 0, 6), "abcdef", 2);
  expect(slice(stretch, 0, 1), "a", 1);
  expect(slice(stretch, 1, 4), "bcd", 1);
  expect(slice(stretch, 2, 4), "cd", 0);
}

TEST(Stretch, APrefixBelongsToWhatFollows) {
  expect(prepend({"a", 1}, "▁"), "▁a", 4);
  expect(prepend({"a", 0}, "▁"), "▁a", 0);
}

TEST(Stretch, AReplacementComesFromTheLastCharacterOfTheMatch) {
  const auto replaced = [](const Stretch& stretch, const char* pattern, const char* content) {
    return replace(stretch, Regex(pattern, "here"), content);
  };
  expect(replaced({" a b", 1}, " ", "▁"), "▁a▁b", 3);
  expect(replaced({" a b", 0}, " ", "▁"), "▁a▁b", 0);
  expect(replaced({"abc", 1}, "ab", "x"), "xc", 0);
  expect(replaced({"abc", 2}, "ab", "x"), "xc", 1);
  expect(replaced({"abc", 1}, "a", ""), "bc", 0);
  expect(replaced({"abc", 1}, "c", "x"), "abx", 1);
  expect(replaced({"", 0}, "c", "x"), "", 0);
}

}  // namespace
}  // namespace veloxquant
