// growth_tool PLAN TOKENS        appends so many tokens one by one to the packed caches of a plan, of a model as it says, and then
// in chunks to others.  JSON: by what resident memory grew, and what effective bits say, from 2560 tokens on; whether both hold
// the same; how far apart their attention is, relative to its largest value.
#include <fmt/format.h>
#include <malloc.h>

#include <cstring>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>

#include "mlx/ops.h"
#include "mlx/random.h"
#include "mlx/transforms.h"
#include "veloxquant/cache/packed_cache.h"
#include "veloxquant/plan/plan_file.h"

using namespace veloxquant;

namespace {

constexpr int kChunk = 512, kWarm = 2560;  // where attention has all the memory that it works in

// Without pages that the allocators of threads hold free.
std::size_t resident_bytes() {
  malloc_trim(0);
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;)
    if (std::size_t kib = 0; word == "VmRSS:" && status >> kib) return kib * 1024;
  throw std::runtime_error("no VmRSS in /proc/self/status");
}

double stored_bytes(const Plan& plan, int tokens) {
  return effective_bits(plan, tokens) / 8 * 2 * plan.model.num_layers * plan.model.num_kv_heads * plan.model.head_dim * tokens;
}

bool same(const AttentionCache& a, const AttentionCache& b) {
  const auto one = dynamic_cast<const SavableCache&>(a).state(), other = dynamic_cast<const SavableCache&>(b).state();
  if (one.size() != other.size()) return false;
  for (const auto& [name, array] : one) {
    const auto& theirs = other.at(name);
    if (array.shape() != theirs.shape() || std::memcmp(array.data<char>(), theirs.data<char>(), array.nbytes()) != 0) return false;
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 3) throw std::runtime_error("usage: growth_tool PLAN TOKENS");
  const Plan plan = read_plan(argv[1]);
  const int tokens = std::stoi(argv[2]) / kChunk * kChunk, layers = plan.model.num_layers, heads = plan.model.num_kv_heads,
            dim = plan.model.head_dim;
  mx::set_default_device(mx::Device::cpu);
  const Rope rope({}, dim);
  // Nobody reads far back while tokens come: that would take hours, and is not what is measured.
  const AttentionSpec near{.scale = 0.1f, .rope = &rope, .sliding_window = 16}, far{.scale = 0.1f, .rope = &rope};
  const auto random = [&](int count, int seed) {
    auto x = mx::random::normal({2, heads, count, dim}, mx::float32, mx::random::key(static_cast<std::uint64_t>(seed)));
    x.eval();
    return x;
  };
  const auto part = [&](const mx::array& x, int which, int begin, int end) {
    auto cut = mx::contiguous(mx::slice(x, {which, 0, begin, 0}, {which + 1, heads, end, dim}));
    cut.eval();
    return cut;
  };
  const auto factory = packed_factory(plan);
  const auto fill = [&](int step, const std::function<void(int)>& after) {
    AttentionCaches caches;
    for (int layer = 0; layer < layers; ++layer) caches.push_back(factory(layer));
    for (int at = 0; at < tokens; at += step) {
      static mx::array chunk = random(1, 0);
      if (at % kChunk == 0) chunk = random(kChunk, at);
      const auto k = part(chunk, 0, at % kChunk, at % kChunk + step), v = part(chunk, 1, at % kChunk, at % kChunk + step);
      for (auto& cache : caches) cache->attend(k, k, v, near).eval();
      after(at + step);
    }
    return caches;
  };
  std::size_t before = 0;
  const auto single = fill(1, [&](int held) { before = held == kWarm ? resident_bytes() : before; });
  const std::size_t after = resident_bytes();
  const auto bulk = fill(kChunk, [](int) {});
  bool equal = true;
  double difference = 0;
  const auto last = random(1, -1);
  for (std::size_t i = 0; i < single.size(); ++i) {
    equal = equal && same(*single[i], *bulk[i]);
    const auto q = part(last, 0, 0, 1), one = single[i]->attend(q, q, part(last, 1, 0, 1), far),
               other = bulk[i]->attend(q, q, part(last, 1, 0, 1), far);
    difference = std::max<double>(difference,
                                  mx::max(mx::abs(mx::subtract(one, other))).item<float>() / mx::max(mx::abs(other)).item<float>());
  }
  fmt::print("{}\n", nlohmann::json{{"grew", after - before},
                                    {"expected", stored_bytes(plan, tokens) - stored_bytes(plan, kWarm)},
                                    {"same", equal},
                                    {"difference", difference}}
                         .dump());
  return 0;
} catch (const std::exception& error) {
  fmt::print(stderr, "growth_tool: {}\n", error.what());
  return 1;
}
