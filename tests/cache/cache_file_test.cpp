#include "veloxquant/cache/cache_file.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/cache/packed_inputs.h"
#include "tests/plan/some_plan.h"
#include "tests/temporary_folder.h"
#include "veloxquant/cache/packed_cache.h"
#include "veloxquant/core/safetensors.h"
#include "veloxquant/model/array_entry.h"

namespace veloxquant {
namespace {

using namespace veloxquant::testing;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

constexpr int kDim = 32, kTokens = 300;

// Two packed layers and, between them, one that slides.
Plan three_layers(std::uint64_t seed = 0) {
  const auto stored = rotated(Sequence(1, kTokens, kDim, 30 + seed), kDim, Rotation::kPlane, 3);
  Plan plan;
  plan.model = some_plan().model;
  plan.provenance = some_plan().provenance;
  plan.provenance.method = "rotated_pq";
  plan.model.num_layers = 3, plan.model.num_kv_heads = kHeads, plan.model.head_dim = kDim;
  plan.window = 32, plan.sinks = 4;
  for (const int layer : {0, 2})
    for (const auto* side : {&stored.keys, &stored.values})
      for (int head = 0; head < kHeads; ++head)
        plan.units.push_back({.layer = layer,
                              .side = side == &stored.keys ? Side::kKeys : Side::kValues,
                              .quantizer = (*side)[static_cast<std::size_t>(head)],
                              .head = head});
  plan.sliding = {{1, 64}};
  return plan;
}

class CacheFile : public ::testing::Test {
 protected:
  CacheFile() {
    const auto factory = packed_factory(plan);
    for (int layer = 0; layer < 3; ++layer) caches.push_back(factory(layer));
    append(caches, 0, 250);
  }

  std::vector<mx::array> append(AttentionCaches& to, int begin, int end) {
    std::vector<mx::array> outs;
    for (auto& cache : to)
      outs.push_back(
          cache->attend(cut(x.q, begin, end), cut(x.k, begin, end), cut(x.v, begin, end), {.scale = 0.3f, .rope = &rope}));
    return outs;
  }

  // What load_caches says of a file with these bytes.
  void refuses(std::string_view bytes, const char* problem) {
    put(path, bytes);
    EXPECT_THAT([&] { load_caches(path, plan); },
                ThrowsMessage<std::runtime_error>(::testing::AllOf(HasSubstr("x.cache"), HasSubstr(problem))));
  }

  // The same with other metadata.
  std::string with(const std::string& field, const std::string& value) {
    save_caches(path, caches, plan);
    const SafetensorsFile file(path);
    auto metadata = file.metadata();
    metadata[field] = value;
    return serialize_entries(file.tensors(), metadata);
  }

  const Sequence x{1, kTokens, kDim};
  const Rope rope{RopeConfig{}, kDim};
  const Plan plan = three_layers();
  AttentionCaches caches;
  const TemporaryFolder folder;
  const std::filesystem::path path = folder / "x.cache";
};

TEST_F(CacheFile, GoesOnAsIfNothingHadBeen) {
  save_caches(path, caches, plan);
  auto loaded = load_caches(path, plan);
  ASSERT_EQ(loaded.size(), 3u);
  for (const auto& cache : loaded) EXPECT_EQ(cache->offset(), 250);
  const auto expected = append(caches, 250, 300), got = append(loaded, 250, 300);
  for (std::size_t layer = 0; layer < 3; ++layer) EXPECT_TRUE(mx::array_equal(got[layer], expected[layer]).item<bool>());
}

TEST_F(CacheFile, SameCachesSameBytes) {
  save_caches(path, caches, plan);
  const std::string bytes = get(path);
  save_caches(path, load_caches(path, plan), plan);
  EXPECT_EQ(get(path), bytes);
}

TEST_F(CacheFile, CachesThatNoTokenHasComeToAreFine) {
  AttentionCaches empty;
  for (int layer = 0; layer < 3; ++layer) empty.push_back(packed_factory(plan)(layer));
  save_caches(path, empty, plan);
  for (const auto& cache : load_caches(path, plan)) EXPECT_EQ(cache->offset(), 0);
}

TEST_F(CacheFile, EveryDamageIsSeen) {
  save_caches(path, caches, plan);
  const std::string bytes = get(path);
  for (std::size_t size = 0; size < bytes.size(); size += 1 + size / 7) refuses(bytes.substr(0, size), "");
  refuses(bytes.substr(0, bytes.size() - 1), "");
  for (std::size_t at = 0; at < bytes.size(); at += 1 + bytes.size() / 200) {
    std::string flipped = bytes;
    flipped[at] = static_cast<char>(flipped[at] ^ (1 << at % 8));
    // Spaces behind the header may be another kind of space.
    if (bytes[at] != ' ') refuses(flipped, "");
  }
  std::string flipped = bytes;
  flipped.back() = static_cast<char>(flipped.back() ^ 1);
  refuses(flipped, "the checksum does not match: the file is damaged");
}

TEST_F(CacheFile, OtherFilesAreRefusedByWhatTheyAre) {
  refuses(with("version", "2"), "version: expected 1, got 2");
  refuses(with("format", "veloxquant-plan"), "format: expected veloxquant-cache, got veloxquant-plan");
  refuses(with("checksum", "0"), "the checksum does not match");
  refuses(serialize_safetensors({}, {}), "no format in the metadata: not a file of caches");
}

TEST_F(CacheFile, AnotherPlanIsNamed) {
  save_caches(path, caches, plan);
  EXPECT_THAT([&] { load_caches(path, three_layers(1)); },
              ThrowsMessage<std::runtime_error>(
                  ::testing::ContainsRegex("plan: expected llama rotated_pq .* bits [0-9a-f]+, got llama rotated_pq")));
}

TEST_F(CacheFile, OtherShapesAreRefusedWithTheirLayer) {
  // The checksum is right: something else wrote it.
  save_caches(path, caches, plan);
  CacheState arrays;
  std::map<std::string, std::string> metadata;
  {
    const SafetensorsFile file(path);
    metadata = file.metadata();
    for (const auto& [name, entry] : file.tensors()) arrays.emplace(name, on_cpu(as_array(entry, name, "x")));
  }
  const auto change = [&](const std::string& name, const mx::array& array, const char* problem) {
    auto changed = arrays;
    changed.insert_or_assign(name, array);
    std::map<std::string, SafetensorsEntry> entries;
    for (const auto& [of, held] : changed) entries.emplace(of, as_entry(held));
    metadata["checksum"] = checksum(metadata["plan"], changed);
    refuses(serialize_entries(entries, metadata), problem);
  };
  change("layers.2.blocks", array_of_zeros({1, 1, 5}, mx::uint8), "layer_2: [packed cache] blocks: expected");
  change("layers.1.keys", array_of_zeros({1, 2, 250}, mx::float32), "layer_1: [cache] expected keys and values of one shape");
  change("layers.7.tokens", array_of_zeros({1}, mx::int32), "layers.7.tokens belongs to no layer of the plan");
}

TEST_F(CacheFile, OtherCachesAreNotSaved) {
  caches.pop_back();
  EXPECT_THAT([&] { save_caches(path, caches, plan); },
              ThrowsMessage<std::invalid_argument>(HasSubstr("caches of 3 layers, got 2")));
}

}  // namespace
}  // namespace veloxquant
