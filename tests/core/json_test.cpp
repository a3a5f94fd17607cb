#include "veloxquant/core/json.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/temporary_folder.h"

namespace veloxquant {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using testing::message_of;
using ::testing::Not;

std::string parse_problem(std::string_view text) {
  return message_of<std::runtime_error>([&] { parse_json(text, "a.json"); });
}

std::string repeated(std::string_view part, int times) {
  std::string text;
  for (int i = 0; i < times; ++i) text += part;
  return text;
}

TEST(Json, ReadsWhatIsValid) {
  const auto json = parse_json(R"( {"a": [1, -2.5e3, true, null, "\u00e9"], "b": {}} )", "a.json");
  EXPECT_EQ(json.at("a").at(0), 1);
  EXPECT_EQ(json.at("a").at(1), -2500.0);
  EXPECT_EQ(json.at("a").at(4), "\xc3\xa9");
}

TEST(Json, RefusesWhatIsNotJson) {
  for (const char* text : {"", " ", "{", "[1,]", "{\"a\": 1} x", "{'a': 1}", "nul", "\"\xff\"", "\"\xc3\"", "\"\xed\xa0\x80\"",
                           "{\"\xff\": 1}", "1e400", "-1e400", "01", "NaN", "Infinity", "[\"a\nb\"]", "// no\n1", "\"\\ud800\""})
    EXPECT_THAT(parse_problem(text), AllOf(HasSubstr("a.json"), HasSubstr("byte"), Not(HasSubstr("\n")))) << text;
}

TEST(Json, RefusesNul) {
  using namespace std::string_view_literals;
  EXPECT_THAT(parse_problem("{}\0trailing"sv), HasSubstr("at byte 3"));
  for (const auto text : {"{\"a\": 1}\0"sv, "\0{}"sv, "[\"\0\"]"sv, "[1,\0 2]"sv})
    EXPECT_THAT(parse_problem(text), HasSubstr("NUL"));
}

TEST(Json, NamesTheByte) {
  EXPECT_THAT(parse_problem("[1, 2, x]"), HasSubstr("at byte 8"));
}

TEST(Json, SaysEndlessRubbishInAFewWords) {
  const std::string problem = parse_problem("\"" + std::string(1 << 20, 'x'));
  EXPECT_FALSE(problem.empty());
  EXPECT_LT(problem.size(), 400u);
}

TEST(Json, RefusesKeysThatStandTwice) {
  EXPECT_THAT(parse_problem(R"({"a": 1, "b": {"a": 1, "a": 2}})"), HasSubstr("\"a\" stands twice"));
  EXPECT_THAT(parse_problem(R"({"a": 1, "\u0061": 2})"), HasSubstr("twice"));
  EXPECT_THAT(parse_problem(R"({"a\n": 1, "a\n": 2})"), Not(HasSubstr("\n")));
  EXPECT_NO_THROW(parse_json(R"([{"a": {"a": 1}}, {"a": 1}])", "a.json"));
}

TEST(Json, LimitsNesting) {
  EXPECT_NO_THROW(parse_json(repeated("[", 64) + repeated("]", 64), "a.json"));
  EXPECT_THAT(parse_problem(repeated("[", 65) + repeated("]", 65)), HasSubstr("deeper than 64"));
  EXPECT_THAT(parse_problem(repeated("[", 10'000'000)), HasSubstr("deeper than 64"));
  EXPECT_THAT(parse_problem(repeated("{\"a\":", 1'000'000)), HasSubstr("deeper than 64"));
}

class JsonFields : public ::testing::Test {
 protected:
  const nlohmann::json json = parse_json(R"({"layers": 12, "big": 9223372036854775808, "bigger": 123456789012345678901234567890,
      "least": -9223372036854775808, "half": 0.5, "whole": 2.0, "yes": true, "name": "llama", "none": null, "inner": {"x": 1}, "list": [1]})",
                                         "a.json");
  const JsonObject object{json, "a.json"};

  template <class Body>
  std::string problem(const Body& body) {
    return message_of<std::runtime_error>(body);
  }
};

TEST_F(JsonFields, ReadsThemByType) {
  EXPECT_EQ(object.integer("layers"), 12);
  EXPECT_EQ(object.integer("least"), std::numeric_limits<std::int64_t>::min());
  EXPECT_EQ(object.number("half"), 0.5);
  EXPECT_EQ(object.number("layers"), 12.0);
  EXPECT_TRUE(object.boolean("yes"));
  EXPECT_EQ(object.string("name"), "llama");
  EXPECT_EQ(object.object("inner").integer("x"), 1);
  EXPECT_TRUE(object.has("layers"));
  EXPECT_FALSE(object.has("none"));
  EXPECT_FALSE(object.has("absent"));
}

TEST_F(JsonFields, TakesTheDefaultForAbsentAndNull) {
  for (const char* field : {"absent", "none"}) {
    EXPECT_EQ(object.integer_or(field, 7, 0, 9), 7);
    EXPECT_EQ(object.number_or(field, 0.25, 0, 1), 0.25);
    EXPECT_TRUE(object.boolean_or(field, true));
    EXPECT_EQ(object.string_or(field, "x"), "x");
  }
  EXPECT_EQ(object.integer_or("layers", 7, 0, 20), 12);
}

TEST_F(JsonFields, RefusesWhatDoesNotFitAndSaysWhy) {
  EXPECT_THAT(problem([&] { object.integer("layers", 1, 8); }),
              AllOf(HasSubstr("a.json"), HasSubstr("layers"), HasSubstr("12"), HasSubstr("from 1 to 8")));
  for (const char* field : {"big", "bigger", "half", "whole", "yes", "name", "none", "inner", "list"})
    EXPECT_THAT(problem([&] { object.integer(field); }), HasSubstr(field));
  for (const char* field : {"yes", "name", "none", "inner", "list"})
    EXPECT_THAT(problem([&] { object.number(field); }), HasSubstr(field));
  for (const char* field : {"layers", "name", "none"}) EXPECT_THAT(problem([&] { object.boolean(field); }), HasSubstr(field));
  for (const char* field : {"layers", "yes", "none"}) EXPECT_THAT(problem([&] { object.string(field); }), HasSubstr(field));
  EXPECT_THAT(problem([&] { object.object("list"); }), AllOf(HasSubstr("list"), HasSubstr("[1]")));
  EXPECT_THAT(problem([&] { object.integer("absent"); }), HasSubstr("no field absent"));
  EXPECT_THAT(problem([&] { object.integer_or("name", 1, 0, 2); }), HasSubstr("llama"));
  EXPECT_THAT(problem([&] { object.expect_only({"layers"}); }), HasSubstr("unknown field"));
  EXPECT_THAT(problem([&] { object.object("inner").integer("x", 2, 3); }), HasSubstr("inner: x"));
}

TEST(Json, ReadsFiles) {
  const testing::TemporaryFolder folder;
  testing::put(folder / "config.json", "{\"a\": 1}");
  EXPECT_EQ(read_json(folder / "config.json").at("a"), 1);
  testing::put(folder / "broken.json", "{");
  EXPECT_THAT(message_of<std::runtime_error>([&] { read_json(folder / "broken.json"); }), HasSubstr("broken.json"));
  EXPECT_THAT(message_of<std::runtime_error>([&] { read_json(folder / "none.json"); }), HasSubstr("none.json"));
}

}  // namespace
}  // namespace veloxquant
