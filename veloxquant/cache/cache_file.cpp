#include "veloxquant/cache/cache_file.h"

#include "veloxquant/cache/packed_cache.h"
#include "veloxquant/core/error.h"
#include "veloxquant/core/safetensors.h"
#include "veloxquant/model/array_entry.h"
#include "veloxquant/plan/plan_file.h"

namespace veloxquant {
namespace {

constexpr const char* kFormat = "veloxquant-cache";
constexpr const char* kVersion = "1";

std::string prefix_of(std::size_t layer) {
  return fmt::format("layers.{}.", layer);
}

const std::string& field(const SafetensorsFile& file, const std::string& name, const std::string& path) {
  const auto found = file.metadata().find(name);
  if (found == file.metadata().end()) throw_failure("cache", "{}: no {} in the metadata: not a file of caches", path, name);
  return found->second;
}

void expect(const SafetensorsFile& file, const std::string& name, const std::string& expected, const std::string& path) {
  if (const auto& got = field(file, name, path); got != expected)
    throw_failure("cache", "{}: {}: expected {}, got {}", path, name, expected, excerpt(got, 160));
}

// The arrays of a layer, taken out of `arrays`.
CacheState take_layer(CacheState& arrays, std::size_t layer) {
  const std::string prefix = prefix_of(layer);
  CacheState state;
  for (auto at = arrays.lower_bound(prefix); at != arrays.end() && at->first.starts_with(prefix); at = arrays.erase(at))
    state.emplace(at->first.substr(prefix.size()), at->second);
  return state;
}

}  // namespace

void save_caches(const std::filesystem::path& path, std::span<const std::unique_ptr<AttentionCache>> caches, const Plan& plan) {
  if (caches.size() != static_cast<std::size_t>(plan.model.num_layers))
    throw_invalid("cache", "expected caches of {} layers, got {}", plan.model.num_layers, caches.size());
  CacheState arrays;
  for (std::size_t layer = 0; layer < caches.size(); ++layer) {
    const auto* cache = dynamic_cast<const SavableCache*>(caches[layer].get());
    if (!cache) throw_invalid("cache", "layer_{}: expected a cache that can be saved", layer);
    for (auto& [name, array] : cache->state()) arrays.emplace(prefix_of(layer) + name, array);
  }
  std::map<std::string, SafetensorsEntry> entries;
  for (const auto& [name, array] : arrays) entries.emplace(name, as_entry(array));
  const std::string identity = plan_identity(plan);
  write_entries(path, entries,
                {{"format", kFormat}, {"version", kVersion}, {"plan", identity}, {"checksum", checksum(identity, arrays)}});
}

AttentionCaches load_caches(const std::filesystem::path& path, const Plan& plan) {
  const std::string where = path.string(), identity = plan_identity(plan);
  const SafetensorsFile file(path);
  expect(file, "format", kFormat, where);
  expect(file, "version", kVersion, where);
  CacheState arrays;
  for (const auto& [name, entry] : file.tensors()) arrays.emplace(name, on_cpu(as_array(entry, name, where)));
  const std::string& written = field(file, "plan", where);
  if (field(file, "checksum", where) != checksum(written, arrays))
    throw_failure("cache", "{}: the checksum does not match: the file is damaged", where);
  expect(file, "plan", identity, where);
  const auto factory = packed_factory(plan);
  AttentionCaches caches;
  for (int layer = 0; layer < plan.model.num_layers; ++layer) {
    caches.push_back(factory(layer));
    try {
      dynamic_cast<SavableCache&>(*caches.back()).restore(take_layer(arrays, caches.size() - 1));
    } catch (const std::invalid_argument& error) {
      throw_failure("cache", "{}: layer_{}: {}", where, layer, error.what());
    }
  }
  if (!arrays.empty()) throw_failure("cache", "{}: {} belongs to no layer of the plan", where, arrays.begin()->first);
  return caches;
}

}  // namespace veloxquant
