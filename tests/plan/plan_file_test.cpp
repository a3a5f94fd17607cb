#include "veloxquant/plan/plan_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <limits>
#include <stdexcept>

#include "tests/plan/some_plan.h"
#include "tests/temporary_folder.h"
#include "veloxquant/core/hash.h"
#include "veloxquant/core/json.h"
#include "veloxquant/core/safetensors.h"
#include "veloxquant/quantize/rotated_pq.h"

namespace veloxquant {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using testing::message_of;
using ::testing::Not;
using testing::some_plan;

// The parts of a file, to be changed and put together again with the right checksum.
struct Parts {
  nlohmann::ordered_json json;
  std::map<std::string, Tensor> tensors;
  std::map<std::string, ByteTensor> byte_tensors;
  std::map<std::string, std::string> metadata;

  std::map<std::string, SafetensorsEntry> entries() const {
    std::map<std::string, SafetensorsEntry> result;
    for (const auto& [name, tensor] : tensors) result[name] = {"F32", tensor.shape, std::as_bytes(std::span(tensor.values))};
    for (const auto& [name, tensor] : byte_tensors) result[name] = {"U8", tensor.shape, std::as_bytes(std::span(tensor.values))};
    return result;
  }

  std::string checksum() const {
    std::string text = metadata.at("plan");
    for (const auto& [name, entry] : entries()) {
      text += "\n" + name;
      for (const auto size : entry.shape) text += " " + std::to_string(size);
      text.append(reinterpret_cast<const char*>(entry.data.data()), entry.data.size());
    }
    return sha256(text);
  }
};

class PlanFile : public ::testing::Test {
 protected:
  Parts parts_of(const Plan& plan) {
    write_plan(plan, path);
    const SafetensorsFile file(path);
    Parts parts{.json = nlohmann::ordered_json::parse(file.metadata().at("plan")),
                .tensors = {},
                .byte_tensors = {},
                .metadata = file.metadata()};
    for (const auto& [name, entry] : file.tensors()) {
      const auto* bytes = reinterpret_cast<const std::uint8_t*>(entry.data.data());
      if (entry.dtype == "U8")
        parts.byte_tensors.emplace(name, ByteTensor{entry.shape, {bytes, bytes + entry.data.size()}});
      else
        parts.tensors.emplace(name, to_float32(entry, name, "x"));
    }
    return parts;
  }

  // What read_plan says of the file after `change`.
  template <class Change>
  std::string problem(const Change& change, const Plan& plan = some_plan()) {
    Parts parts = parts_of(plan);
    change(parts);
    parts.metadata["plan"] = parts.json.dump();
    if (parts.metadata.contains("checksum")) parts.metadata["checksum"] = parts.checksum();
    write_entries(path, parts.entries(), parts.metadata);
    const std::string text = message_of<std::runtime_error>([&] { read_plan(path); });
    EXPECT_TRUE(text.empty() || text.find("x.plan") != std::string::npos) << text;
    EXPECT_THAT(text, Not(HasSubstr("\n")));
    return text;
  }

  testing::TemporaryFolder folder;
  const std::filesystem::path path = folder / "x.plan";
};

TEST_F(PlanFile, RoundTripIsExact) {
  Plan plan = some_plan();
  write_plan(plan, path);
  EXPECT_EQ(read_plan(path), plan);
  plan.predicted_kl.reset();
  plan.provenance.texts.clear();
  write_plan(plan, path);
  EXPECT_EQ(read_plan(path), plan);
}

TEST_F(PlanFile, SamePlanSameBytes) {
  write_plan(some_plan(), path);
  const std::string first = testing::get(path);
  write_plan(read_plan(path), path);
  EXPECT_EQ(testing::get(path), first);
}

TEST_F(PlanFile, IsTheDocumentedFile) {
  const Parts parts = parts_of(some_plan());
  EXPECT_EQ(parts.metadata.at("format"), "veloxquant-plan");
  EXPECT_EQ(parts.metadata.at("version"), "4");
  EXPECT_EQ(parts.metadata.at("checksum"), parts.checksum());
  EXPECT_EQ(parts.tensors.at("layers.0.keys.codebook").shape, (std::vector<std::int64_t>{2, 2, 2}));
  EXPECT_EQ(parts.json.at("units").at(0).at("tensors").at("codebook"), "layers.0.keys.codebook");
  EXPECT_EQ(parts.json.at("effective_bits"), effective_bits(some_plan()));
}

// A plan survives whatever one byte is changed to only if it is still the same plan (spaces that pad the header, say).
TEST_F(PlanFile, EveryDamagedByteIsSeen) {
  const Plan plan = some_plan();
  write_plan(plan, path);
  const std::string whole = testing::get(path);
  const auto damaged = folder / "damaged.plan";
  int refused = 0;
  constexpr int kChanges[] = {0x01, 0x20, 0x80, 0xff};
  for (std::size_t i = 0; i < whole.size(); ++i) {
    std::string bytes = whole;
    bytes[i] = static_cast<char>(bytes[i] ^ kChanges[i % 4]);
    testing::put(damaged, bytes);
    try {
      ASSERT_EQ(read_plan(damaged), plan) << "byte " << i;
    } catch (const std::runtime_error& error) {
      ASSERT_THAT(error.what(), HasSubstr("damaged.plan"));
      ++refused;
    }
  }
  EXPECT_GT(refused, static_cast<int>(whole.size()) - 70);
}

TEST_F(PlanFile, EveryTruncationIsSeen) {
  write_plan(some_plan(), path);
  const std::string whole = testing::get(path);
  for (std::size_t size = 0; size < whole.size(); ++size) {
    testing::put(path, whole.substr(0, size));
    ASSERT_THROW(read_plan(path), std::runtime_error) << size;
  }
}

TEST_F(PlanFile, OtherFilesAreNoPlans) {
  write_safetensors(path, {{"weight", {{1}, {1}}}}, {});
  EXPECT_THAT(message_of<std::runtime_error>([&] { read_plan(path); }), HasSubstr("not a plan"));
  EXPECT_THAT(message_of<std::runtime_error>([&] { read_plan(folder / "none.plan"); }), HasSubstr("none.plan"));
}

TEST_F(PlanFile, RefusesMetadataThatIsNotAPlans) {
  EXPECT_EQ(problem([](Parts&) {}), "");
  EXPECT_THAT(problem([](Parts& parts) { parts.metadata["format"] = "gguf"; }), HasSubstr("gguf"));
  EXPECT_THAT(problem([](Parts& parts) { parts.metadata["version"] = "5"; }), AllOf(HasSubstr("version"), HasSubstr("got 5")));
  EXPECT_THAT(problem([](Parts& parts) { parts.metadata["more"] = "x"; }), HasSubstr("metadata"));
  for (const char* field : {"format", "version", "checksum"})
    EXPECT_THAT(problem([&](Parts& parts) { parts.metadata.erase(field); }), HasSubstr(field));
}

TEST_F(PlanFile, RefusesMissingFieldsAndNamesThem) {
  const Parts parts = parts_of(some_plan());
  const auto each = [&](const std::string& pointer) {
    const nlohmann::ordered_json::json_pointer at(pointer);
    for (const auto& [field, value] : parts.json.at(at).items())
      EXPECT_THAT(problem([&](Parts& changed) { changed.json.at(at).erase(field); }), HasSubstr(field)) << pointer;
    EXPECT_THAT(problem([&](Parts& changed) { changed.json.at(at)["surplus"] = 1; }), HasSubstr("surplus")) << pointer;
  };
  for (const char* pointer :
       {"", "/model", "/units/0", "/units/0/numbers", "/units/0/tensors", "/units/3", "/provenance", "/provenance/texts/0"})
    each(pointer);
}

TEST_F(PlanFile, RefusesFieldsThatMakeNoSense) {
  const struct {
    const char* pointer;
    nlohmann::json value;
  } cases[] = {
      {"/model", 1},
      {"/model/num_layers", 3},
      {"/model/num_layers", 0},
      {"/model/num_layers", 2.5},
      {"/model/num_layers", 1e300},
      {"/model/num_layers", std::numeric_limits<std::int64_t>::max()},
      {"/model/head_dim", 8},
      {"/model/head_dim", 65535},
      {"/model/num_kv_heads", -1},
      {"/model/architecture", 1},
      {"/model/config_hash", nullptr},
      {"/window", 32},
      {"/sinks", 4},
      {"/units", nullptr},
      {"/units", nlohmann::json::array()},
      {"/units/1", 1},
      {"/units/1/layer", 1},
      {"/units/1/layer", -1},
      {"/units/1/side", "keys"},
      {"/units/1/side", "queries"},
      {"/units/1/dim", 8},
      {"/units/1/method", "gguf"},
      {"/units/1/method", "kivi"},
      {"/units/1/numbers/bits", 0},
      {"/units/1/numbers/bits", 9},
      {"/units/1/numbers/bits", 2.5},
      {"/units/1/numbers/group_size", 0},
      {"/units/0/numbers/num_subspaces", 4},
      {"/units/0/numbers/num_subspaces", 3},
      {"/units/0/numbers/num_centroids", 4},
      {"/units/0/tensors/codebook", "layers.0.keys.smooth_factors"},
      {"/units/0/tensors/codebook", "layers.9.keys.codebook"},
      {"/units/0/tensors/codebook", 1},
      {"/units/2/numbers/seed", -1},
      {"/provenance/method", "zzz"},
      {"/provenance/units", "bogus"},
      {"/provenance/device", "tpu"},
      {"/provenance/context", 0},
      {"/provenance/sequence_length", 0},
      {"/provenance/bits", -1},
      {"/provenance/bits", nullptr},
      {"/provenance/seed", -1},
      {"/provenance/seed", 0.5},
      {"/provenance/num_samples", 0},
      {"/provenance/texts", "book.txt"},
      {"/provenance/texts/0", "book.txt"},
      {"/predicted_kl", -1},
      {"/predicted_kl", "0"},
      {"/effective_bits", 2},
      {"/effective_bits", nullptr},
  };
  for (const auto& c : cases) {
    const nlohmann::ordered_json::json_pointer pointer(c.pointer);
    EXPECT_NE(problem([&](Parts& parts) { parts.json.at(pointer) = c.value; }), "") << c.pointer << " = " << c.value;
  }
}

TEST_F(PlanFile, RefusesTensorsThatDoNotFit) {
  const std::string codebook = "layers.0.keys.codebook", factors = "layers.0.keys.smooth_factors";
  EXPECT_THAT(problem([&](Parts& parts) { parts.tensors.erase(codebook); }), HasSubstr("codebook"));
  EXPECT_THAT(problem([&](Parts& parts) { parts.tensors["surplus"] = {{1}, {1}}; }), HasSubstr("surplus"));
  EXPECT_THAT(problem([&](Parts& parts) { parts.tensors[codebook].shape = {2, 4}; }), HasSubstr("codebook"));
  EXPECT_THAT(problem([&](Parts& parts) { parts.tensors[factors] = {{3}, {1, 1, 1}}; }), HasSubstr("smooth_factors"));
  for (const float value : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    EXPECT_THAT(problem([&](Parts& parts) { parts.tensors[codebook].values[3] = value; }), HasSubstr("codebook"));
    EXPECT_THAT(problem([&](Parts& parts) { parts.tensors[factors].values[3] = value; }), HasSubstr("smooth_factors"));
  }
  EXPECT_THAT(problem([&](Parts& parts) { parts.tensors[factors].values[0] = 0; }), HasSubstr("smooth_factors"));
  EXPECT_THAT(problem([&](Parts& parts) {
                parts.json["units"][1]["tensors"]["codebook"] = codebook;
                parts.tensors["layers.0.values.codebook"] = parts.tensors[codebook];
              }),
              HasSubstr("codebook"));
}

// Keys and values of rotated_pq, as formats up to 3 have them.
QuantizerParameters float_unit(Side side, int plane) {
  QuantizerParameters unit{.method = "rotated_pq",
                           .side = side,
                           .dim = 4,
                           .numbers = {{"codes", 2}, {"stages", 2}, {"num_centroids", 3}, {"patches", 1}, {"plane", plane}},
                           .tensors = {}};
  unit.tensors = {
      {"mean", {{4}, {1, 2, 3, -4}}},
      {"transform", {{4, 4}, {2, 0, 0, 1, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}}},
      {"codebook", {{2, 3, 4}, {1, 2, 3, 4, -1, -2, -3, -4, 0, 1, 0, 1, .1f, .2f, .3f, .4f, -.1f, 0, 0, 0, 0, 0, .5f, 0}}}};
  return unit;
}

Plan plan_of_bytes() {
  Plan plan = some_plan();
  plan.model.num_layers = 1;
  plan.units = {{0, Side::kKeys, with_byte_tables(float_unit(Side::kKeys, 1))},
                {0, Side::kValues, with_byte_tables(float_unit(Side::kValues, 0))}};
  return plan;
}

TEST_F(PlanFile, EntriesOfRotatedPqAreBytes) {
  const Plan plan = plan_of_bytes();
  const Parts parts = parts_of(plan);
  EXPECT_EQ(read_plan(path), plan);
  EXPECT_EQ(parts.byte_tensors.at("layers.0.keys.entries").shape, (std::vector<std::int64_t>{2, 3, 4}));
  EXPECT_EQ(parts.tensors.at("layers.0.values.offsets").shape, (std::vector<std::int64_t>{2, 4}));
  EXPECT_EQ(parts.tensors.at("layers.0.values.scales").shape, (std::vector<std::int64_t>{1}));
  // Mean, transform, offsets and a scale; the entries.
  EXPECT_EQ(constant_bytes(plan), 2 * ((4 + 16 + 8 + 1) * sizeof(float) + 2 * 3 * 4));
}

TEST_F(PlanFile, RefusesDamagedTablesOfBytes) {
  const Plan plan = plan_of_bytes();
  const std::string keys = "layers.0.keys.", entries = keys + "entries", offsets = keys + "offsets", scales = keys + "scales";
  EXPECT_EQ(problem([](Parts&) {}, plan), "");
  EXPECT_THAT(problem([&](Parts& parts) { parts.byte_tensors.erase(entries); }, plan), HasSubstr("entries"));
  EXPECT_THAT(problem([&](Parts& parts) { parts.byte_tensors[entries].shape = {2, 4, 3}; }, plan), HasSubstr("entries"));
  EXPECT_THAT(problem([&](Parts& parts) { parts.byte_tensors[entries].values.assign(24, 200); }, plan), HasSubstr("entries"));
  EXPECT_THAT(problem([&](Parts& parts) { parts.tensors[offsets].values[1] = 0.25f; }, plan), HasSubstr("offsets"));
  EXPECT_THAT(problem([&](Parts& parts) { parts.tensors[offsets].values[1] = 1e6f; }, plan), HasSubstr("offsets"));
  for (const float value : {0.0f, -1.0f, std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()})
    EXPECT_THAT(problem([&](Parts& parts) { parts.tensors[scales].values[0] = value; }, plan), HasSubstr("scales")) << value;
  // Of another type.
  EXPECT_THAT(problem(
                  [&](Parts& parts) {
                    parts.byte_tensors.erase(entries);
                    parts.tensors[entries] = {{2, 3, 4}, std::vector<float>(24)};
                  },
                  plan),
              HasSubstr("entries"));
  EXPECT_THAT(problem(
                  [&](Parts& parts) {
                    parts.tensors.erase(scales);
                    parts.byte_tensors[scales] = {{1}, {1}};
                  },
                  plan),
              HasSubstr("scales"));
}

TEST_F(PlanFile, FloatEntriesOfFormat3AreRoundedAsTheyAreRead) {
  const Plan plan = plan_of_bytes();
  const auto as_format_3 = [](Parts& parts) {
    parts.metadata["version"] = "3";
    parts.byte_tensors.clear();
    parts.tensors.clear();
    int unit = 0;
    for (const Side side : {Side::kKeys, Side::kValues}) {
      auto names = nlohmann::ordered_json::object();
      for (const auto& [name, tensor] : float_unit(side, 0).tensors) {
        names[name] = "layers.0." + std::string(to_string(side)) + "." + name;
        parts.tensors.emplace(names[name], tensor);
      }
      parts.json["units"][unit++]["tensors"] = names;
    }
  };
  EXPECT_EQ(problem(as_format_3, plan), "");
  EXPECT_EQ(read_plan(path), plan);
  const auto damaged = [&](const auto& change) { return problem([&](Parts& parts) { as_format_3(parts), change(parts); }, plan); };
  const std::string codebook = "layers.0.values.codebook";
  EXPECT_THAT(damaged([&](Parts& parts) { parts.tensors[codebook].values[3] = std::numeric_limits<float>::infinity(); }),
              HasSubstr("codebook"));
  EXPECT_THAT(damaged([&](Parts& parts) { parts.tensors[codebook].shape = {3, 2, 4}; }), HasSubstr("codebook"));
  EXPECT_THAT(damaged([&](Parts& parts) {
                parts.tensors.erase(codebook);
                parts.byte_tensors[codebook] = {{2, 3, 4}, std::vector<std::uint8_t>(24)};
              }),
              HasSubstr("codebook"));
  for (const std::string& name : {std::string("mean"), std::string("transform"), std::string("codebook")}) {
    const std::string tensor = "layers.0.keys." + name;
    EXPECT_THAT(damaged([&](Parts& parts) { parts.tensors.erase(tensor); }), HasSubstr(name));
    EXPECT_THAT(damaged([&](Parts& parts) { parts.tensors[tensor] = {{1}, {1}}; }), HasSubstr(name));
    EXPECT_THAT(damaged([&](Parts& parts) { parts.tensors[tensor] = {{0}, {}}; }), HasSubstr(name));
    EXPECT_THAT(damaged([&](Parts& parts) { parts.tensors[tensor].values[0] = std::numeric_limits<float>::quiet_NaN(); }),
                HasSubstr(name));
  }
  EXPECT_THAT(damaged([&](Parts& parts) {
                auto& values = parts.tensors["layers.0.values.transform"].values;
                values.assign(values.size(), 0);
              }),
              HasSubstr("transform"));
  for (const char* number : {"codes", "stages", "num_centroids"})
    for (const int value : {0, -1, 5, 1 << 30})
      EXPECT_NE(damaged([&](Parts& parts) { parts.json["units"][1]["numbers"][number] = value; }), "") << number << " " << value;
  // Bytes are of format 4.
  EXPECT_THAT(problem([](Parts& parts) { parts.metadata["version"] = "3"; }, plan), HasSubstr("U8"));
}

// What could not be read is not written, and the old file stays.
TEST_F(PlanFile, WritesOnlyWhatCanBeRead) {
  write_plan(some_plan(), path);
  const std::string before = testing::get(path);
  const auto refused = [&](const auto& change) {
    Plan plan = some_plan();
    change(plan);
    return !message_of<std::exception>([&] { write_plan(plan, path); }).empty();
  };
  EXPECT_TRUE(refused([](Plan& plan) { plan.units.pop_back(); }));
  EXPECT_TRUE(refused([](Plan& plan) { plan.provenance.bits = std::numeric_limits<double>::quiet_NaN(); }));
  EXPECT_TRUE(refused(
      [](Plan& plan) { plan.units[0].quantizer.tensors.at("codebook").values[0] = std::numeric_limits<float>::infinity(); }));
  EXPECT_TRUE(refused([](Plan& plan) { plan.units[0].quantizer.tensors.erase("codebook"); }));
  EXPECT_EQ(testing::get(path), before);
}

// What is the same whatever the model reads says so by no samples, and then has neither length nor texts.
TEST_F(PlanFile, SamplesMayBeNone) {
  Plan plan = some_plan();
  plan.provenance.num_samples = plan.provenance.sequence_length = 0;
  EXPECT_THAT(message_of<std::runtime_error>([&] { write_plan(plan, path); }), HasSubstr("texts"));
  plan.provenance.texts.clear();
  write_plan(plan, path);
  EXPECT_EQ(read_plan(path), plan);
}

// Making one rotation of 1023 dimensions takes seconds, and checking must not wait for any.
TEST_F(PlanFile, ManyLargeRotationsAreReadAtOnce) {
  Plan plan = some_plan();
  plan.model.num_layers = 64;
  plan.model.head_dim = 1023;
  plan.units.clear();
  for (int layer = 0; layer < 64; ++layer)
    for (const Side side : {Side::kKeys, Side::kValues})
      plan.units.push_back(
          {layer, side, {.method = "turboquant", .side = side, .dim = 1023, .numbers = {{"bits", 2}, {"seed", 1}}, .tensors = {}}});
  const auto start = std::chrono::steady_clock::now();
  write_plan(plan, path);
  EXPECT_EQ(read_plan(path), plan);
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(5));
}

TEST_F(PlanFile, NamesOfTextsNeedNotBeUtf8) {
  Plan plan = some_plan();
  plan.provenance.texts = {{"caf\xe9.txt", "00"}};
  write_plan(plan, path);
  EXPECT_EQ(read_plan(path).provenance.texts.at(0).name, "caf\xef\xbf\xbd.txt");
}

TEST_F(PlanFile, DescriptionSaysWhatFollows) {
  const Plan plan = some_plan();
  const auto json = describe_plan(plan);
  EXPECT_EQ(json.at("effective_bits"), effective_bits(plan));
  EXPECT_EQ(json.at("constant_bytes"), constant_bytes(plan));
  EXPECT_EQ(json.at("bytes_per_token"), bytes_per_token(plan));
  EXPECT_EQ(json.at("units").at(0).at("bits"), 2.0);
  EXPECT_EQ(json.at("units").at(1).at("bits"), 10.0);
}

}  // namespace
}  // namespace veloxquant
