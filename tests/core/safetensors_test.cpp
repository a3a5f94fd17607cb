#include "veloxquant/core/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "tests/temporary_folder.h"

namespace veloxquant {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using testing::message_of;
using ::testing::Not;

std::string with_length(std::uint64_t length, const std::string& rest) {
  std::string bytes(sizeof(length), '\0');
  std::memcpy(bytes.data(), &length, sizeof(length));
  return bytes + rest;
}

std::string file_of(const std::string& header, std::size_t data_bytes) {
  return with_length(header.size(), header + std::string(data_bytes, '\0'));
}

std::string entry(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return R"({"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets + "}";
}

class Safetensors : public ::testing::Test {
 protected:
  SafetensorsFile read(const std::string& bytes) {
    testing::put(path, bytes);
    return SafetensorsFile(path);
  }

  // Expects a refusal in one line that names the file.
  std::string problem(const std::string& bytes) {
    const std::string text = message_of<std::runtime_error>([&] { read(bytes); });
    EXPECT_THAT(text, AllOf(HasSubstr("hostile.safetensors"), Not(HasSubstr("\n"))));
    return text;
  }

  std::string header_problem(const std::string& header, std::size_t data_bytes = 0) { return problem(file_of(header, data_bytes)); }

  std::string entry_problem(const std::string& dtype, const std::string& shape, const std::string& offsets,
                            std::size_t data_bytes) {
    return header_problem("{\"weight\":" + entry(dtype, shape, offsets) + "}", data_bytes);
  }

  testing::TemporaryFolder folder;
  const std::filesystem::path path = folder / "hostile.safetensors";
};

TEST_F(Safetensors, RoundTrip) {
  const std::map<std::string, Tensor> tensors = {{"a", {{2, 3}, {1, -2, 3.5, 0, std::numeric_limits<float>::infinity(), 1e-40f}}},
                                                 {"none", {{0, 4}, {}}},
                                                 {"scalar", {{}, {7}}},
                                                 {"ümlaut \"x\"\n", {{1}, {8}}}};
  const std::map<std::string, std::string> metadata = {{"format", "x"}, {"plan", "{\"a\": [1, \"ü\"]}\n"}};
  write_safetensors(path, tensors, metadata);
  const SafetensorsFile file(path);
  EXPECT_EQ(file.metadata(), metadata);
  ASSERT_EQ(file.tensors().size(), tensors.size());
  for (const auto& [name, tensor] : tensors) EXPECT_EQ(to_float32(file.tensors().at(name), name, "x"), tensor) << name;
}

TEST_F(Safetensors, SameContentSameBytesAndAlignedData) {
  for (int length = 0; length < 130; ++length) {
    const std::string name(static_cast<std::size_t>(length) + 1, 'n');
    const std::string bytes = serialize_safetensors({{name, {{1}, {1}}}}, {{"k", "v"}});
    EXPECT_EQ(bytes, serialize_safetensors({{name, {{1}, {1}}}}, {{"k", "v"}}));
    EXPECT_EQ((bytes.size() - sizeof(float)) % 64, 0u);
    EXPECT_EQ(read(bytes).tensors().size(), 1u);
  }
}

TEST_F(Safetensors, WithoutTensorsOrMetadata) {
  EXPECT_TRUE(read(file_of("{}", 0)).tensors().empty());
  EXPECT_TRUE(read(file_of(R"({"__metadata__":null})", 0)).metadata().empty());
  EXPECT_EQ(read(file_of(R"({"__metadata__":{"a":"b"}}   )", 0)).metadata().at("a"), "b");
  EXPECT_TRUE(read(serialize_safetensors({}, {})).tensors().empty());
}

TEST_F(Safetensors, RefusesToWriteWhatCannotBeRead) {
  EXPECT_THROW(serialize_safetensors({{"a", {{2}, {1}}}}, {}), std::invalid_argument);
  EXPECT_THROW(serialize_safetensors({{"a", {{-1, -1}, {1, 2}}}}, {}), std::invalid_argument);
  EXPECT_THROW(serialize_safetensors({{"a\xff", {{1}, {1}}}}, {}), std::invalid_argument);
  EXPECT_THROW(serialize_safetensors({}, {{"a", "\xff"}}), std::invalid_argument);
  EXPECT_THROW(serialize_safetensors({{"__metadata__", {{1}, {1}}}}, {}), std::invalid_argument);
}

TEST_F(Safetensors, RefusesFilesTooShort) {
  const std::string whole = serialize_safetensors({{"a", {{3}, {1, 2, 3}}}}, {{"k", "v"}});
  for (std::size_t size = 0; size < whole.size(); ++size) problem(whole.substr(0, size));
  problem(whole + '\0');
}

TEST_F(Safetensors, RefusesHeaderLengths) {
  for (const std::uint64_t length :
       {std::uint64_t{3}, std::uint64_t{100'000'001}, std::uint64_t{1} << 62, (std::uint64_t{1} << 63) - 1, std::uint64_t{1} << 63,
        ~std::uint64_t{0} - 7, ~std::uint64_t{0}})
    EXPECT_THAT(problem(with_length(length, "{}")), HasSubstr(std::to_string(length)));
  problem(with_length(0, ""));
  problem(with_length(0, "{}"));
}

TEST_F(Safetensors, RefusesHeadersThatAreNoObjectOfEntries) {
  for (const char* header :
       {"[]", "1", "null", "\"x\"", "{", "{}}", "{\"a\":1}", "{\"a\":null}", "{\"a\":[]}", "{\"a\":{}}", "\xff\xff"})
    header_problem(header);
  header_problem(std::string(1'000'000, '['));
  header_problem(R"({"a":{"dtype":"F32","shape":[1]}})", 4);
  header_problem(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"more":1}})", 4);
  header_problem(R"({"a":{"dtype":1,"shape":[1],"data_offsets":[0,4]}})", 4);
}

TEST_F(Safetensors, RefusesMetadataThatIsNotText) {
  for (const char* metadata : {"1", "[]", "\"x\"", R"({"a":1})", R"({"a":null})", R"({"a":{"b":"c"}})"})
    EXPECT_THAT(header_problem(std::string(R"({"__metadata__":)") + metadata + "}"), HasSubstr("__metadata__"));
}

TEST_F(Safetensors, RefusesEntriesAndNamesThem) {
  const struct {
    const char *dtype, *shape, *offsets;
    std::size_t data_bytes;
  } cases[] = {
      {"F33", "[1]", "[0,4]", 4},
      {"f32", "[1]", "[0,4]", 4},
      {"", "[1]", "[0,4]", 4},
      {"F32", "1", "[0,4]", 4},
      {"F32", "[-1]", "[0,4]", 4},
      {"F32", "[1.0]", "[0,4]", 4},
      {"F32", "[\"1\"]", "[0,4]", 4},
      {"F32", "[2]", "[0,4]", 4},
      {"F32", "[]", "[0,0]", 0},
      {"F32", "[4611686018427387904]", "[0,0]", 0},    // 2^62 · 4 = 2^64
      {"F32", "[4294967296,4294967296]", "[0,0]", 0},  // 2^64
      {"U8", "[4294967296,4294967296,3]", "[0,0]", 0},
      {"U8", "[9223372036854775808]", "[0,0]", 0},
      {"U8", "[18446744073709551615]", "[0,0]", 0},
      {"U8", "[18446744073709551617]", "[0,1]", 1},
      {"U8", "[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1]", "[0,1]", 1},
      {"F32", "[1]", "[0]", 4},
      {"F32", "[1]", "[0,4,4]", 4},
      {"F32", "[1]", "[0,4.0]", 4},
      {"F32", "[1]", "[-4,0]", 4},
      {"F32", "[1]", "[4,0]", 4},
      {"F32", "[1]", "[0,8]", 4},
      {"F32", "[1]", "[18446744073709551612,18446744073709551616]", 4},
      {"F32", "[1]", "[18446744073709551612,0]", 4},
      {"F32", "[1]", "[9223372036854775804,9223372036854775808]", 4},
      {"F32", "[0]", "[9223372036854775807,9223372036854775807]", 0},
      {"F32", "[1]", "[4,8]", 8},  // a hole before
  };
  for (const auto& c : cases)
    EXPECT_THAT(entry_problem(c.dtype, c.shape, c.offsets, c.data_bytes), HasSubstr("weight")) << c.dtype << c.shape << c.offsets;
}

TEST_F(Safetensors, RefusesHolesOverlapsAndTrailingBytes) {
  const auto two = [&](const char* a, const char* b, std::size_t data_bytes) {
    return header_problem("{\"first\":" + entry("F32", "[1]", a) + ",\"second\":" + entry("F32", "[1]", b) + "}", data_bytes);
  };
  EXPECT_THAT(two("[0,4]", "[2,6]", 6), HasSubstr("second"));
  EXPECT_THAT(two("[0,4]", "[0,4]", 4), HasSubstr("starts at byte 0"));
  EXPECT_THAT(two("[0,4]", "[6,10]", 10), HasSubstr("second"));
  EXPECT_THAT(two("[0,4]", "[4,8]", 9), HasSubstr("cover 8"));
  EXPECT_NO_THROW(read(file_of("{\"b\":" + entry("F32", "[1]", "[4,8]") + ",\"a\":" + entry("F32", "[1]", "[0,4]") + "}", 8)));
}

TEST_F(Safetensors, RefusesNamesThatStandTwice) {
  const std::string one = "\"w\":" + entry("F32", "[1]", "[0,4]");
  EXPECT_THAT(header_problem("{" + one + "," + one + "}", 4), HasSubstr("twice"));
  EXPECT_THAT(header_problem(R"({"__metadata__":{"a":"b","a":"c"}})"), HasSubstr("twice"));
}

TEST_F(Safetensors, NamesWithControlCharactersStayInOneLine) {
  header_problem(R"({"a\nb\u001b[31m":{}})");
}

// Every half there is, against the definition of the format.
TEST_F(Safetensors, ReadsHalves) {
  std::string header =
      "{\"h\":" + entry("F16", "[256,256]", "[0,131072]") + ",\"b\":" + entry("BF16", "[65536]", "[131072,262144]") + "}";
  std::string bytes = file_of(header, 262144);
  for (std::uint32_t i = 0; i < 65536; ++i) {
    const auto bits = static_cast<std::uint16_t>(i);
    std::memcpy(bytes.data() + 8 + header.size() + 2 * i, &bits, 2);
    std::memcpy(bytes.data() + 8 + header.size() + 131072 + 2 * i, &bits, 2);
  }
  const auto file = read(bytes);
  const Tensor half = to_float32(file.tensors().at("h"), "h", "x"), brain = to_float32(file.tensors().at("b"), "b", "x");
  EXPECT_EQ(half.shape, (std::vector<std::int64_t>{256, 256}));
  for (std::uint32_t i = 0; i < 65536; ++i) {
    const int exponent = static_cast<int>(i >> 10 & 31), fraction = static_cast<int>(i & 1023);
    const double size = exponent == 0    ? std::ldexp(fraction, -24)
                        : exponent == 31 ? (fraction ? std::nan("") : std::numeric_limits<double>::infinity())
                                         : std::ldexp(1024 + fraction, exponent - 25);
    const double expected = i >> 15 ? -size : size;
    if (std::isnan(expected)) {
      EXPECT_TRUE(std::isnan(half.values[i]));
    } else {
      ASSERT_EQ(half.values[i], expected) << i;
    }
    ASSERT_EQ(std::bit_cast<std::uint32_t>(brain.values[i]), i << 16);
  }
}

TEST_F(Safetensors, OtherTypesAreReadButNotAsNumbers) {
  const auto file = read(file_of("{\"codes\":" + entry("U8", "[3]", "[0,3]") + "}", 3));
  EXPECT_EQ(file.tensors().at("codes").data.size(), 3u);
  EXPECT_THAT(message_of<std::runtime_error>([&] { to_float32(file.tensors().at("codes"), "codes", "a file"); }),
              AllOf(HasSubstr("codes"), HasSubstr("a file"), HasSubstr("U8")));
}

}  // namespace
}  // namespace veloxquant
