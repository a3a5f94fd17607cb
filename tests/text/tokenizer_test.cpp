// Tokens and texts are compared with Hugging Face's tokenizers in tests/python/test_tokenizer.py; here is what needs no reference.
#include "veloxquant/text/tokenizer.h"

#include <gtest/gtest.h>

#include <stdexcept>
#include <string>
#include <thread>

#include "tests/temporary_folder.h"

namespace veloxquant {
namespace {

using nlohmann::json;
using Tokens = std::vector<std::int32_t>;

// a … d are 0 … 3; merges ab, cd, abcd in this order.
json small() {
  return json::parse(R"({"version": "1.0", "added_tokens": [], "normalizer": null,
    "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": false},
    "post_processor": null, "decoder": {"type": "ByteLevel"},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2, "d": 3, "ab": 4, "cd": 5, "abcd": 6, "bc": 7},
              "merges": ["a b", "c d", ["ab", "cd"], "b c"]}})");
}

json added(const std::string& content, const json& changes = {}) {
  json token = {{"id", 8},         {"content", content}, {"special", false},    {"normalized", false},
                {"lstrip", false}, {"rstrip", false},    {"single_word", false}};
  if (!changes.is_null()) token.update(changes);
  return token;
}

class TokenizerTest : public ::testing::Test {
 protected:
  Tokenizer load(const std::string& text) {
    testing::put(folder_ / "tokenizer.json", text);
    return Tokenizer::load(folder_.path());
  }
  Tokenizer load(const json& file) { return load(file.dump()); }

  void expect_refused(const std::string& text, const std::string& part) {
    try {
      load(text);
      ADD_FAILURE() << "not refused: " << text.substr(0, 300);
    } catch (const std::runtime_error& error) {
      const std::string message = error.what();
      EXPECT_NE(message.find("tokenizer.json"), std::string::npos) << message;
      EXPECT_NE(message.find(part), std::string::npos) << message << " lacks " << part;
      EXPECT_EQ(message.find('\n'), std::string::npos) << message;
      EXPECT_LT(message.size(), 1000u);
    }
  }

  testing::TemporaryFolder folder_;
};

TEST_F(TokenizerTest, MergesByRankThenFromTheLeft) {
  const Tokenizer tokenizer = load(small());
  EXPECT_EQ(tokenizer.encode("abcd"), (Tokens{6}));
  EXPECT_EQ(tokenizer.encode("bcd"), (Tokens{1, 5}));  // c d comes before b c
  EXPECT_EQ(tokenizer.encode("bc"), (Tokens{7}));
  EXPECT_EQ(tokenizer.encode("aab ba"), (Tokens{0, 4, 1, 0}));
  EXPECT_EQ(tokenizer.encode(""), Tokens{});
  EXPECT_EQ(tokenizer.encode("x€\xff"), Tokens{});  // no unknown token
}

TEST_F(TokenizerTest, IgnoringMergesTakesWholeWords) {
  json file = small();
  file["model"]["merges"] = json::array();
  EXPECT_EQ(load(file).encode("abcd ab ba"), (Tokens{0, 1, 2, 3, 0, 1, 1, 0}));
  file["model"]["ignore_merges"] = true;
  EXPECT_EQ(load(file).encode("abcd ab ba"), (Tokens{6, 4, 1, 0}));
}

TEST_F(TokenizerTest, UnknownCharacters) {
  json file = small();
  file["model"]["unk_token"] = "bc";
  EXPECT_EQ(load(file).encode("xya"), (Tokens{7, 7, 0}));
  file["model"]["fuse_unk"] = true;
  EXPECT_EQ(load(file).encode("xyaz x"), (Tokens{7, 0, 7, 7}));
  file["model"]["unk_token"] = "<missing>";
  EXPECT_EQ(load(file).encode("ab"), (Tokens{4}));
  EXPECT_THROW(load(file).encode("x"), std::runtime_error);
}

// As Llama 2's: ▁ is the space, é has its bytes, € only one of them.
TEST_F(TokenizerTest, SentencePiece) {
  json file = small();
  file["normalizer"] = json::parse(R"({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]})");
  file["pre_tokenizer"] = nullptr;
  file["decoder"] =
      json::parse(R"({"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]})");
  auto& model = file["model"];
  model["vocab"].update({{"<unk>", 8}, {"<0xC3>", 9}, {"<0xA9>", 10}, {"<0xE2>", 11}, {"▁", 12}, {"▁a", 13}, {"d▁", 14}});
  model["merges"].insert(model["merges"].end(), {json::array({"▁", "a"}), json::array({"d", "▁"})});
  model.update({{"byte_fallback", true}, {"unk_token", "<unk>"}, {"fuse_unk", true}});
  const Tokenizer tokenizer = load(file);
  EXPECT_EQ(tokenizer.encode("abcd a"), (Tokens{12, 6, 13}));  // a b comes before ▁ a
  EXPECT_EQ(tokenizer.encode("a d b"), (Tokens{13, 12, 14, 1}));
  EXPECT_EQ(tokenizer.encode("é"), (Tokens{12, 9, 10}));
  EXPECT_EQ(tokenizer.encode("a€é€b"), (Tokens{13, 9, 10, 8, 1}));  // the unknown token waits for one that is known
  EXPECT_EQ(tokenizer.encode(""), Tokens{});
  EXPECT_EQ(tokenizer.decode(tokenizer.encode("  abcd é a")), "  abcd é a");
  EXPECT_EQ(tokenizer.decode(Tokens{12, 0, 9}), "a\uFFFD");
}

TEST_F(TokenizerTest, MetaspacePrependsWhereTheTextBegins) {
  json file = small();
  file["model"]["vocab"].update({{"_", 8}, {"_a", 9}, {"_ab", 10}});
  file["model"]["merges"] = {"a b", "_ ab", "_ a"};
  file["added_tokens"] = {added("<x>"), added("<y>", {{"normalized", true}})};
  const auto encode = [&](const char* scheme, const char* text) {
    file["pre_tokenizer"] = {{"type", "Metaspace"}, {"replacement", "_"}, {"prepend_scheme", scheme}};
    return load(file).encode(text);
  };
  EXPECT_EQ(encode("always", "ab<x>ab<y>ab a"), (Tokens{10, 11, 10, 12, 10, 9}));
  EXPECT_EQ(encode("first", "ab<x>ab<y>ab a"), (Tokens{10, 11, 4, 12, 4, 9}));
  EXPECT_EQ(encode("first", "<x>ab"), (Tokens{11, 4}));
  EXPECT_EQ(encode("never", "ab<x>ab a"), (Tokens{4, 11, 4, 9}));
  EXPECT_EQ(encode("always", " ab_ab"), (Tokens{10, 10}));
  file["normalizer"] = {{"type", "Strip"}, {"strip_left", true}, {"strip_right", true}};
  EXPECT_EQ(encode("first", "ab "), (Tokens{10}));
  EXPECT_EQ(encode("first", " ab"), (Tokens{4}));
}

// It would be found between any two characters.
TEST_F(TokenizerTest, AddedTokensThatNormaliseToNothingAreRefused) {
  json file = small();
  file["normalizer"] = {{"type", "Strip"}, {"strip_left", true}, {"strip_right", true}};
  file["added_tokens"] = {added("\t ", {{"normalized", true}})};
  expect_refused(file.dump(), "added_tokens");
}

TEST_F(TokenizerTest, AddedTokens) {
  json file = small();
  file["added_tokens"] = {added("<x>"), added("<x>>", {{"special", true}}), added("<w>", {{"single_word", true}}),
                          added("<s>", {{"lstrip", true}, {"rstrip", true}})};
  const Tokenizer tokenizer = load(file);
  EXPECT_EQ(tokenizer.vocabulary_size(), 12);
  EXPECT_EQ(tokenizer.token_to_id("<x>>"), 9);
  EXPECT_EQ(tokenizer.token_to_id("abcd"), 6);
  EXPECT_EQ(tokenizer.token_to_id("nothing"), std::nullopt);
  EXPECT_EQ(tokenizer.encode("a<x>b<x>><x>"), (Tokens{0, 8, 1, 9, 8}));
  EXPECT_EQ(tokenizer.encode("<w>a <w> a<w>"), (Tokens{0, 10, 0}));
  EXPECT_EQ(tokenizer.encode("a \n<s>\u2003<s> b"), (Tokens{0, 11, 11, 1}));
  EXPECT_EQ(tokenizer.decode(Tokens{0, 8, 9, 1}), "a<x>b");
  EXPECT_EQ(tokenizer.decode(Tokens{0, 8, 9, 1}, false), "a<x><x>>b");
}

TEST_F(TokenizerTest, DecodingLeavesOutWhatDoesNotExist) {
  const Tokenizer tokenizer = load(small());
  EXPECT_EQ(tokenizer.decode(Tokens{-1, 0, 8, 1'000'000'000, 1, -2'147'483'648}), "ab");
  EXPECT_EQ(tokenizer.decode({}), "");
}

// Each piece as its token comes, the rest behind "|"; nothing is given that a later token changes.
TEST_F(TokenizerTest, TextComesAsSoonAsItIsCertain) {
  json file = small();
  const auto streamed = [&](const char* decoder, const Tokens& tokens) {
    file["decoder"] = json::parse(decoder);
    const Tokenizer tokenizer = load(file);
    TextStream stream(tokenizer);
    std::string pieces;
    for (const auto token : tokens) pieces += "[" + stream.add(token) + "]";
    return pieces + "|" + stream.finish();
  };
  // Bytes C3, A9 and E2 as byte-level tokenizers write them, and as SentencePiece does.
  file["model"]["vocab"].update(
      {{"Ã", 8}, {"©", 9}, {"â", 10}, {"<0xC3>", 11}, {"<0xA9>", 12}, {"▁", 13}, {"▁▁a▁", 14}, {"€", 15}});
  const char* byte_level = R"({"type": "ByteLevel"})";
  EXPECT_EQ(streamed(byte_level, {0, 8, 9, 1}), "[a][][é][b]|");
  EXPECT_EQ(streamed(byte_level, {8, 1, 9, 10, 8, 9}), "[][\uFFFDb][\uFFFD][][\uFFFD][é]|");
  EXPECT_EQ(streamed(byte_level, {0, 10}), "[a][]|\uFFFD");
  EXPECT_EQ(streamed(byte_level, {15, 0, 15}), "[€][a][€]|");  // stands for no byte
  const char* bytes = R"({"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]})";
  EXPECT_EQ(streamed(bytes, {13, 0, 11, 12, 1}), "[][a][][][éb]|");
  EXPECT_EQ(streamed(bytes, {11, 12, 12, 1, 11, 12}), "[][][][\uFFFD\uFFFD\uFFFDb][][]|é");
  EXPECT_EQ(streamed(bytes, {14, 14, 13}), "[ a ][  a ][ ]|");
  // Of spaces at an end, one goes away: of the text behind Fuse, of each token before it.
  EXPECT_EQ(streamed(R"({"type": "Sequence", "decoders": [{"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
    {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 0, "stop": 1}]})",
                     {14, 14, 13, 13, 0, 13}),
            "[a][  a][ ][ ][ a][]|");
  EXPECT_EQ(streamed(R"({"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "Strip", "content": " ", "start": 3, "stop": 1}]})",
                     {14, 13, 13, 0}),
            "[a][][][a]|");
  EXPECT_EQ(streamed("null", {0, 1, 1}), "[a][ b][ b]|");
  // A pattern behind Fuse may match across tokens.
  EXPECT_EQ(streamed(R"({"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "Replace", "pattern": {"String": "ba"},
    "content": "c"}]})",
                     {0, 1, 0, 1}),
            "[][][][]|acb");
}

TEST_F(TokenizerTest, TemplatesGoAroundTheText) {
  json file = small();
  const auto pieces = [](const char* text) { return json::parse(text); };
  const json special =
      pieces(R"({"b": {"id": "b", "ids": [1], "tokens": ["b"]}, "cd": {"id": "cd", "ids": [2, 3], "tokens": ["c", "d"]}})");
  const json inner = {
      {"type", "TemplateProcessing"},
      {"special_tokens", special},
      {"single", pieces(R"([{"SpecialToken": {"id": "b"}}, {"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "cd"}}])")}};
  file["post_processor"] = inner;
  EXPECT_EQ(load(file).encode("a", true), (Tokens{1, 0, 2, 3}));
  EXPECT_EQ(load(file).prefix(), (Tokens{1}));
  EXPECT_EQ(load(small()).prefix(), Tokens{});
  EXPECT_EQ(load(file).encode("a"), (Tokens{0}));
  json outer = inner;
  outer["single"] = pieces(R"([{"SpecialToken": {"id": "cd"}}, {"Sequence": {"id": "A"}}])");
  file["post_processor"] = {{"type", "Sequence"}, {"processors", {{{"type", "ByteLevel"}}, inner, outer}}};
  EXPECT_EQ(load(file).encode("a", true), (Tokens{2, 3, 1, 0, 2, 3}));
  EXPECT_EQ(load(file).prefix(), (Tokens{2, 3, 1}));
  // So that a model with fewer rows is known not to be of it.
  EXPECT_EQ(load(file).vocabulary_size(), 8);
  outer["special_tokens"]["cd"]["ids"] = {40};
  file["post_processor"] = outer;
  EXPECT_EQ(load(file).vocabulary_size(), 41);
}

TEST_F(TokenizerTest, OneTokenizerServesManyThreads) {
  const Tokenizer tokenizer = load(small());
  const Tokens expected = tokenizer.encode("abcd bcd ab");
  std::vector<int> same(4);
  std::vector<std::thread> threads;
  for (auto& result : same)
    threads.emplace_back([&] {
      for (int i = 0; i < 200; ++i) result += tokenizer.encode("abcd bcd ab") == expected;
    });
  for (auto& thread : threads) thread.join();
  for (const int result : same) EXPECT_EQ(result, 200);
}

TEST_F(TokenizerTest, AMegabyteWithoutASpace) {
  std::string text;
  while (text.size() < 1 << 20) text += "abcd";
  json file = small();
  for (const bool byte_fallback : {false, true}) {
    file["model"]["byte_fallback"] = byte_fallback;
    EXPECT_EQ(load(file).encode(text), Tokens(text.size() / 4, 6));
  }
}

TEST_F(TokenizerTest, OtherKindsAreRefusedByName) {
  const auto refused = [&](const char* pointer, const json& value, const char* part) {
    json file = small();
    file[json::json_pointer(pointer)] = value;
    expect_refused(file.dump(), part);
  };
  for (const char* type : {"Unigram", "WordPiece", "WordLevel"}) refused("/model/type", type, type);
  refused("/model/dropout", 0.1, "dropout");
  refused("/model/byte_fallback", 1, "byte_fallback");
  refused("/model/continuing_subword_prefix", "##", "##");
  refused("/model/end_of_word_suffix", "</w>", "</w>");
  for (const char* type : {"Nmt", "BertNormalizer", "StripAccents", "Precompiled", "ByteLevel"}) {
    refused("/normalizer", {{"type", type}}, type);
    refused("/normalizer", {{"type", type}}, "NFKC, NFKD, Lowercase, Prepend, Replace, Strip");
  }
  refused("/normalizer", {{"type", "Sequence"}, {"normalizers", {{{"type", "NFC"}}, {{"type", "Nmt"}}}}},
          "normalizer: normalizers[1]");
  refused("/normalizer", {{"type", "Replace"}, {"pattern", {{"Regex", "(a"}}}, {"content", ""}}, "(a");
  refused("/normalizer", {{"type", "Prepend"}}, "prepend");
  for (const char* type :
       {"Whitespace", "WhitespaceSplit", "BertPreTokenizer", "CharDelimiterSplit", "UnicodeScripts", "FixedLength"}) {
    refused("/pre_tokenizer", {{"type", type}}, type);
    refused("/pre_tokenizer", {{"type", type}}, "Split, ByteLevel, Digits, Metaspace, Punctuation");
  }
  refused("/pre_tokenizer", {{"type", "Sequence"}, {"pretokenizers", {{{"type", "Whitespace"}}}}},
          "pre_tokenizer: pretokenizers[0]");
  refused("/pre_tokenizer", {{"type", "Metaspace"}, {"replacement", "ab"}}, "one character");
  refused("/pre_tokenizer", {{"type", "Metaspace"}, {"replacement", ""}}, "one character");
  refused("/pre_tokenizer", {{"type", "Metaspace"}, {"replacement", "_"}, {"prepend_scheme", "last"}}, "always, first or never");
  refused("/pre_tokenizer", {{"type", "Metaspace"}, {"replacement", "_"}, {"add_prefix_space", false}}, "prepend_scheme never");
  refused("/pre_tokenizer/behavior", "Sideways", "MergedWithPrevious");
  refused("/pre_tokenizer/pattern", {{"Regex", "(a"}}, "(a");
  refused("/pre_tokenizer/pattern", {{"Other", "a"}}, "Regex");
  for (const char* type : {"BPEDecoder", "WordPiece", "CTC"}) {
    refused("/decoder", {{"type", type}}, type);
    refused("/decoder", {{"type", type}}, "ByteLevel, ByteFallback, Fuse, Metaspace, Replace, Strip");
  }
  refused("/decoder", {{"type", "Sequence"}, {"decoders", {{{"type", "Fuse"}}, {{"type", "CTC"}}}}}, "decoder: decoders[1]");
  refused("/decoder", {{"type", "Strip"}, {"content", " "}, {"start", -1}, {"stop", 0}}, "start");
  refused("/post_processor", {{"type", "BertProcessing"}}, "BertProcessing");
  refused("/version", "2.0", "2.0");
}

TEST_F(TokenizerTest, DamagedFilesAreRefused) {
  const auto refused = [&](const char* pointer, const json& value, const char* part) {
    json file = small();
    file[json::json_pointer(pointer)] = value;
    expect_refused(file.dump(), part);
  };
  refused("/model/vocab/a", -1, "-1");
  refused("/model/vocab/a", 1.5, "1.5");
  refused("/model/vocab/a", 1e18, "a");
  refused("/model/vocab/a", 4, "ab");
  refused("/model/vocab", json::array(), "vocab");
  refused("/model/merges", "a b", "merges");
  for (const json& merge :
       {json("ab"), json("a b c"), json::array({"a"}), json::array({"a", 1}), json("x y"), json::array({"d", "d"}), json(7)})
    refused("/model/merges/0", merge, "merges[0]");
  refused("/added_tokens", 3, "added_tokens");
  refused("/added_tokens", json::array({3}), "added_tokens[0]");
  refused("/added_tokens", json::array({added("x", {{"lstrip", 3}})}), "lstrip");
  refused("/added_tokens", json::array({added("x", {{"id", -1}})}), "-1");
  refused("/pre_tokenizer", {{"type", "Sequence"}, {"pretokenizers", 1}}, "pretokenizers");
  refused("/pre_tokenizer", "Split", "pre_tokenizer");
  const json no_text = {{"type", "TemplateProcessing"}, {"single", json::array()}, {"special_tokens", json::object()}};
  refused("/post_processor", no_text, "single");
  json file = small();
  file.erase("model");
  expect_refused(file.dump(), "model");
  for (const std::string& text :
       {std::string(), std::string("{"), std::string("[]"), std::string(100'000, '['), std::string("{\"a\": \"\xff\"}")})
    expect_refused(text, "");
}

TEST_F(TokenizerTest, EveryTruncationIsRefused) {
  const std::string whole = small().dump();
  for (std::size_t size = 0; size < whole.size(); ++size) expect_refused(whole.substr(0, size), "");
}

TEST_F(TokenizerTest, MissingFile) {
  EXPECT_THROW(Tokenizer::load(folder_.path() / "nowhere"), std::runtime_error);
}

TEST(BundledTokenizer, TextComesBack) {
  const Tokenizer tokenizer = Tokenizer::load(std::filesystem::path(VELOXQUANT_SOURCE_DIR) / "examples" / "demo");
  EXPECT_EQ(tokenizer.vocabulary_size(), 8192);
  for (const std::string text : {"Plain words, it's 1234.\n\n\t end", "日本語 🙂👩‍👩‍👧 \r\n  ", "é\u00a0Ω"})
    EXPECT_EQ(tokenizer.decode(tokenizer.encode(text)), text);
  EXPECT_EQ(tokenizer.decode(tokenizer.encode("e\u0301 \xff")), "\u00e9 \uFFFD");
  EXPECT_EQ(tokenizer.decode(tokenizer.encode("a<|endoftext|>b")), "ab");
}

}  // namespace
}  // namespace veloxquant
