// Attention over codes on a GPU: kernel time by events with the L2 cache flushed, and its results against sums in double precision.
// usage: packed_attention    prints one line a shape: tokens, batch, milliseconds
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "veloxquant/kernels/cuda/packed_attention.cuh"
#include "veloxquant/kernels/cuda/packed_attention_end.cuh"

namespace veloxquant {
namespace {

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "packed_attention: %s\n", cudaGetErrorString(status));
  std::exit(1);
}

template <class T>
T* on_device(const std::vector<T>& values) {
  T* to;
  check(cudaMalloc(&to, std::max<std::size_t>(values.size(), 1) * sizeof(T)));
  check(cudaMemcpy(to, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return to;
}

extern __shared__ uint4 shared_memory[];

template <int kKeyUnits, int kValueUnits, int kWarps, int kFullDim>
__global__ void attend(AttentionCodes codes, QueryRows queries, AttentionTables tables, ExactTokens exact, int sequence_heads,
                       AttentionParts parts) {
  attend_packed<kKeyUnits, kValueUnits, kWarps, true, true, kFullDim>(codes, queries, tables, exact, sequence_heads, parts,
                                                                      shared_memory);
}

__global__ void __launch_bounds__(kFinishThreads)
    finish(AttentionParts parts, int splits, int kv_heads, QueryRows queries, const float* inverse, const float* mean, float* out) {
  const int head = blockIdx.x % kv_heads;
  finish_attention(parts, splits, 1, queries, inverse + head * queries.dim * queries.dim, mean + head * queries.dim, out,
                   shared_memory);
}

struct Shape {
  int batch, heads, kv_heads, dim, tokens, patches;
};

// 2 bits: dim/4 codes of 8 bits in dim/8 pairs, each pair eight dimensions.
template <int kUnits, int kWarps = 8, int kFullDim = 0>
void measure(const Shape& shape, bool compare) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const auto byte = [&](int below) { return static_cast<unsigned char>(random() % static_cast<unsigned>(below)); };
  const int dim = shape.dim, codes = dim / 4, group = shape.heads / shape.kv_heads, sinks = 4, window = 32, units = dim / 8,
            patch_bytes = 3 + dim / 2, side_bytes = (codes * 256 + shape.patches * patch_bytes + 15) / 16 * 16,
            head_words = 2 * side_bytes / 4, block_words = shape.kv_heads * head_words, blocks = (shape.tokens + 255) / 256,
            sequence_heads = shape.batch * shape.kv_heads;

  std::vector<unsigned char> key_tables(static_cast<std::size_t>(shape.kv_heads) * 2 * 256 * kUnits * 8), value_tables = key_tables;
  for (auto* tables : {&key_tables, &value_tables})
    for (auto& entry : *tables) entry = byte(128);
  std::vector<KeyUnit> key_units(static_cast<std::size_t>(shape.kv_heads) * kUnits);
  std::vector<ValueUnit> value_units(key_units.size());
  std::vector<unsigned> turns;
  for (int i = 0; i < dim / 2; ++i)
    turns.push_back(static_cast<unsigned>(std::llround(std::pow(1e4, -2.0 * i / dim) / (2 * M_PI) * 4294967296.0)));
  std::vector<__half> rests(static_cast<std::size_t>(shape.kv_heads) * kUnits * 8 * 8);  // [units, 8, columns]
  for (auto& rest : rests) rest = __float2half(normal(random) * 0.3f);
  for (std::size_t i = 0; i < key_units.size(); ++i) {
    const int unit = static_cast<int>(i) % kUnits;
    KeyUnit& key = key_units[i];
    key = {{}, {2 * unit, 2 * unit + 1}, 0.02f, 8 * unit, 8, {}, {}};
    ValueUnit& value = value_units[i];
    value = {{2 * unit, 2 * unit + 1}, 0.02f, 8 * unit, 8, {}};
    for (int j = 0; j < 8; ++j) {
      key.columns[j] = 4 * unit + j / 2 + (j % 2) * dim / 2;
      if (j % 2 == 0) key.turns[j / 2] = turns[static_cast<std::size_t>(4 * unit + j / 2) % turns.size()];
      key.offsets[j] = static_cast<unsigned short>(0x6400 + 120 + byte(16));
      value.low[j] = -2.5f + 0.1f * normal(random);
    }
    if (unit >= units) key = {}, value = {}, std::fill_n(key.columns, 8, -1);
  }
  std::vector<HeadBlocks> heads;
  for (int h = 0; h < shape.kv_heads; ++h)
    heads.push_back({h * head_words, codes, shape.patches, h * head_words + side_bytes / 4, codes, shape.patches});

  const std::size_t sequence_words = static_cast<std::size_t>(blocks) * static_cast<std::size_t>(block_words);
  std::vector<unsigned> stored(static_cast<std::size_t>(shape.batch) * sequence_words);
  for (auto& word : stored) word = static_cast<unsigned>(random());
  auto* stored_bytes = reinterpret_cast<unsigned char*>(stored.data());
  for (std::size_t side = 0; side < stored.size() * 4 / static_cast<std::size_t>(side_bytes); ++side) {
    std::vector<int> places;
    while (static_cast<int>(places.size()) < shape.patches)
      if (const int place = byte(std::min(255, (shape.tokens - 1) % 256 + 1));
          std::find(places.begin(), places.end(), place) == places.end())
        places.push_back(place);
    std::sort(places.begin(), places.end());
    for (int p = 0; p < shape.patches; ++p) {
      auto* patch = stored_bytes + side * static_cast<std::size_t>(side_bytes) + codes * 256 + p * patch_bytes;
      patch[0] = static_cast<unsigned char>(places[static_cast<std::size_t>(p)]), patch[1] = 0, patch[2] = 0x2c;  // 1/16
    }
  }
  const int token_bytes = 4 * ((dim + 63) / 64) + dim;
  std::vector<unsigned char> exact(static_cast<std::size_t>(sequence_heads) * 2 * (sinks + window) *
                                   static_cast<std::size_t>(token_bytes));
  for (std::size_t token = 0; token < exact.size() / static_cast<std::size_t>(token_bytes); ++token)
    for (int i = 0; i < token_bytes; ++i) {
      const bool scale = i < 4 * ((dim + 63) / 64);
      // 1/64 and −2.
      const unsigned char scales[4] = {0, 0x24, 0, 0xc0};
      exact[token * static_cast<std::size_t>(token_bytes) + static_cast<std::size_t>(i)] = scale ? scales[i % 4] : byte(256);
    }
  std::vector<float> q(static_cast<std::size_t>(sequence_heads) * static_cast<std::size_t>(group * dim)), inverse, mean;
  for (auto& x : q) x = normal(random);
  for (int i = 0; i < shape.kv_heads * dim * dim; ++i) inverse.push_back(normal(random) / std::sqrt(static_cast<float>(dim)));
  for (int i = 0; i < shape.kv_heads * dim; ++i) mean.push_back(normal(random));

  int processors = 0, limit = 0;
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0));
  check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
  const int tiles = (shape.tokens + 31) / 32, row_groups = (group + 3) / 4,
            splits = std::max(1, std::min(tiles / kWarps, processors / (sequence_heads * row_groups)));
  const std::size_t parts_rows = static_cast<std::size_t>(sequence_heads) * static_cast<std::size_t>((splits + 1) * group);
  const AttentionCodes attention_codes{on_device(stored), on_device(stored), blocks, block_words, shape.tokens, shape.kv_heads};
  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  const QueryRows queries{on_device(q), group, dim, scale * 1.44269504f, 0.0f, sinks, 1.0f};
  // Keys in the rotated space: A⁻¹ by lanes, as FullKeyTables has it.
  std::vector<float> key_inverse, key_mean;
  std::vector<uint2> fragments;
  std::vector<int> places;
  for (int i = 0; i < dim; ++i) places.push_back(i / 2 + i % 2 * dim / 2);
  for (int i = 0; i < shape.kv_heads * dim * dim; ++i) key_inverse.push_back(normal(random) / std::sqrt(static_cast<float>(dim)));
  for (int i = 0; i < shape.kv_heads * dim; ++i) key_mean.push_back(normal(random));
  std::vector<float> placed_mean;
  for (int h = 0; h < shape.kv_heads; ++h)
    for (const int place : places) placed_mean.push_back(key_mean[static_cast<std::size_t>(h * dim + place)]);
  for (int h = 0; h < shape.kv_heads && kFullDim > 0; ++h)
    for (int product = 0; product < dim / 8; ++product)
      for (int chunk = 0; chunk < kUnits / 2; ++chunk)
        for (int lane = 0; lane < 32; ++lane) {
          const int unit = chunk / 2 * 4 + lane % 4, first = chunk % 2 * 4,
                    column = places[static_cast<std::size_t>(8 * product + lane / 4)];
          const auto entry = [&](int i) {
            return unit < units ? 0.02f * key_inverse[(static_cast<std::size_t>(h) * dim + 8 * unit + first + i) * dim + column]
                                : 0.0f;
          };
          const __half2 low = __floats2half2_rn(entry(0), entry(2)), high = __floats2half2_rn(entry(1), entry(3));
          fragments.push_back({*reinterpret_cast<const unsigned*>(&low), *reinterpret_cast<const unsigned*>(&high)});
        }
  const FullKeyTables full{on_device(fragments), on_device(placed_mean), on_device(places), on_device(turns)};
  const AttentionTables tables{on_device(key_tables),
                               on_device(value_tables),
                               on_device(key_units),
                               on_device(value_units),
                               on_device(rests),
                               on_device(heads),
                               full,
                               shape.kv_heads,
                               8};
  const AttentionParts parts{on_device(std::vector<float>(parts_rows)), on_device(std::vector<float>(parts_rows)),
                             on_device(std::vector<float>(parts_rows * static_cast<std::size_t>(dim)))};
  const ExactTokens exact_tokens{on_device(exact), sinks,  window, shape.tokens, shape.tokens + sinks + window,
                                 on_device(turns), dim / 2};
  const float *value_inverse = on_device(inverse), *value_mean = on_device(mean);
  float* out = on_device(std::vector<float>(q.size()));
  const auto attend_kernel = attend<kUnits, kUnits, kWarps, kFullDim>;
  const std::size_t memory = sizeof(typename CodeAttention<kUnits, kUnits, kWarps, true, true, kFullDim>::Memory) +
                             2 * 32 * kWarps * 2 * static_cast<std::size_t>(codes);
  if (memory > static_cast<std::size_t>(limit)) return void(std::printf("%zu bytes of shared memory are too many\n", memory));
  check(cudaFuncSetAttribute(attend_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(memory)));
  const auto finish_memory = static_cast<int>(sizeof(float)) * finish_floats(dim, splits + 1);
  check(cudaFuncSetAttribute(finish, cudaFuncAttributeMaxDynamicSharedMemorySize, finish_memory));
  const auto run_attend = [&] {
    attend_kernel<<<dim3(splits, sequence_heads + blocks_of_exact(sequence_heads, splits), row_groups), 32 * kWarps, memory>>>(
        attention_codes, queries, tables, exact_tokens, sequence_heads, parts);
  };
  const auto run_finish = [&] {
    finish<<<dim3(sequence_heads, (dim + kColumnsAtOnce - 1) / kColumnsAtOnce, row_groups), kFinishThreads, finish_memory>>>(
        parts, splits, shape.kv_heads, queries, value_inverse, value_mean, out);
  };
  run_attend(), run_finish();
  check(cudaDeviceSynchronize());

  if (compare) {
    std::vector<float> got(q.size());
    check(cudaMemcpy(got.data(), out, got.size() * sizeof(float), cudaMemcpyDeviceToHost));
    double worst = 0, largest = 0;
    for (int sh = 0; sh < sequence_heads; ++sh) {
      const int h = sh % shape.kv_heads, sequence = sh / shape.kv_heads, tokens = shape.tokens + sinks + window;
      std::vector<double> keys, values;  // [tokens, dim], values rotated where they are codes
      std::vector<bool> coded;
      const auto decode = [&](int position, bool key, std::vector<double>& x) {
        x.assign(static_cast<std::size_t>(dim), 0.0);
        if (position < sinks || position >= shape.tokens + sinks) {
          const int place = position < sinks ? position : sinks + position % window;
          const auto* bytes = exact.data() + ((static_cast<std::size_t>(sh) * 2 + (key ? 0 : 1)) * (sinks + window) +
                                              static_cast<std::size_t>(place)) *
                                                 token_bytes;
          for (int i = 0; i < dim; ++i) x[static_cast<std::size_t>(i)] = bytes[token_bytes - dim + i] / 64.0 - 2;
        } else {
          const int index = position - sinks;
          const auto* block =
              stored_bytes +
              (static_cast<std::size_t>(sequence) * sequence_words + static_cast<std::size_t>(index / 256) * block_words) * 4 +
              static_cast<std::size_t>(h * head_words * 4 + (key ? 0 : side_bytes));
          const auto code = [&](int c) { return block[index % 256 / 32 * codes * 32 + c / 4 * 128 + index % 32 * 4 + c % 4]; };
          const auto& tables_of = key ? key_tables : value_tables;
          std::vector<double> rest(static_cast<std::size_t>(dim));
          for (int p = 0; p < shape.patches; ++p) {
            const auto* patch = block + codes * 256 + p * patch_bytes;
            for (int i = 0; i < dim && patch[0] == index % 256; ++i)
              rest[static_cast<std::size_t>(i)] = ((patch[3 + i / 2] >> 4 * (i % 2) & 15) - 7.5) / 16;
          }
          for (int u = 0; u < units; ++u)
            for (int j = 0; j < 8; ++j) {
              const auto entry = [&](int stage) {
                return tables_of[((static_cast<std::size_t>(h) * 256 + code(2 * u + stage)) * 2 + stage) * kUnits * 8 +
                                 static_cast<std::size_t>(u * 8 + j)];
              };
              const double sum = entry(0) + entry(1);
              const std::size_t unit = static_cast<std::size_t>(h * kUnits + u);
              if (key) {
                // Offsets stand x of two planes, y of both.
                const int slot = 4 * (j / 4) + (j % 2) * 2 + j / 2 % 2;
                double value = 0.02 * (sum - (key_units[unit].offsets[slot] - 0x6400));
                if (kFullDim > 0) {
                  x[static_cast<std::size_t>(8 * u + j)] = value + rest[static_cast<std::size_t>(8 * u + j)];
                  continue;
                }
                for (int i = 0; i < 8; ++i)
                  value += 0.02 * rest[static_cast<std::size_t>(8 * u + i)] * __half2float(rests[(unit * 8 + j) * 8 + i]);
                x[static_cast<std::size_t>(key_units[unit].columns[j])] = value;
              } else {
                x[static_cast<std::size_t>(8 * u + j)] =
                    0.02 * sum + value_units[unit].low[j] + rest[static_cast<std::size_t>(8 * u + j)];
              }
            }
        }
        if (!key) return;
        if (kFullDim > 0 && position >= sinks && position < shape.tokens + sinks) {
          const std::vector<double> z = x;
          for (int i = 0; i < dim; ++i) {
            double sum = key_mean[static_cast<std::size_t>(h * dim + i)];
            for (int j = 0; j < dim; ++j)
              sum += z[static_cast<std::size_t>(j)] * key_inverse[(static_cast<std::size_t>(h) * dim + j) * dim + i];
            x[static_cast<std::size_t>(i)] = sum;
          }
        }
        for (int i = 0; i < dim / 2; ++i) {
          const double angle = position * (turns[static_cast<std::size_t>(i)] / 4294967296.0) * 2 * M_PI;
          double &a = x[static_cast<std::size_t>(i)], &b = x[static_cast<std::size_t>(i + dim / 2)], old = a;
          a = a * std::cos(angle) - b * std::sin(angle), b = old * std::sin(angle) + b * std::cos(angle);
        }
      };
      for (int r = 0; r < group; ++r) {
        const float* query = q.data() + (static_cast<std::size_t>(sh) * group + r) * dim;
        std::vector<double> x, rotated(static_cast<std::size_t>(dim)), sum(static_cast<std::size_t>(dim));
        double total = 0, coded_total = 0;
        for (int t = 0; t < tokens; ++t) {
          decode(t, true, x);
          double score = 0;
          for (int i = 0; i < dim; ++i) score += query[i] * x[static_cast<std::size_t>(i)];
          const double weight = std::exp(score * scale);
          const bool code = t >= sinks && t < shape.tokens + sinks;
          total += weight, coded_total += code ? weight : 0;
          decode(t, false, x);
          for (int i = 0; i < dim; ++i)
            (code ? rotated : sum)[static_cast<std::size_t>(i)] += weight * x[static_cast<std::size_t>(i)];
        }
        for (int i = 0; i < dim; ++i) {
          double value = sum[static_cast<std::size_t>(i)] + coded_total * mean[static_cast<std::size_t>(h * dim + i)];
          for (int j = 0; j < dim; ++j)
            value += rotated[static_cast<std::size_t>(j)] * inverse[(static_cast<std::size_t>(h) * dim + j) * dim + i];
          value /= total;
          const double is = got[(static_cast<std::size_t>(sh) * group + r) * dim + i];
          worst = std::max(worst, std::isfinite(is) ? std::abs(is - value) : 1e9), largest = std::max(largest, std::abs(value));
        }
      }
    }
    std::printf("%d tokens, batch %d, %d/%d heads of %d, %d patches%s: off by %.2e of %.2f\n", shape.tokens, shape.batch,
                shape.heads, shape.kv_heads, dim, shape.patches, kFullDim > 0 ? ", full" : "", worst, largest);
    if (!(worst < 2e-3 * largest)) std::exit(1);
  } else {
    void* flush;
    const std::size_t flushed = std::size_t{256} << 20;
    check(cudaMalloc(&flush, flushed));
    cudaEvent_t begin, middle, end;
    cudaEventCreate(&begin), cudaEventCreate(&middle), cudaEventCreate(&end);
    std::vector<float> attend_times, whole_times;
    for (int i = 0; i < 30; ++i) {
      check(cudaMemset(flush, i, flushed));
      cudaEventRecord(begin);
      run_attend();
      cudaEventRecord(middle);
      run_finish();
      cudaEventRecord(end);
      check(cudaEventSynchronize(end));
      float ms;
      cudaEventElapsedTime(&ms, begin, middle), attend_times.push_back(ms);
      cudaEventElapsedTime(&ms, begin, end), whole_times.push_back(ms);
    }
    std::sort(attend_times.begin(), attend_times.end()), std::sort(whole_times.begin(), whole_times.end());
    std::printf("%d tokens, batch %d, %d/%d heads of %d, %d patches%s: %.4f ms, of which codes %.4f ms; %d splits\n", shape.tokens,
                shape.batch, shape.heads, shape.kv_heads, dim, shape.patches, kFullDim > 0 ? ", full" : "", whole_times[15],
                attend_times[15], splits);
    cudaFree(flush);
  }
  for (const void* memory : {static_cast<const void*>(attention_codes.closed), static_cast<const void*>(attention_codes.open)})
    cudaFree(const_cast<void*>(memory));
}

}  // namespace
}  // namespace veloxquant

int main() {
  using namespace veloxquant;
  measure<16>({1, 8, 2, 128, 1000, 0}, true);
  measure<16>({2, 8, 2, 128, 1037, 3}, true);
  measure<8>({1, 2, 2, 64, 700, 5}, true);
  measure<8>({1, 12, 2, 64, 5000, 3}, true);
  measure<16, 8, 128>({2, 8, 2, 128, 1037, 3}, true);
  measure<8, 8, 64>({1, 12, 2, 64, 700, 5}, true);
  measure<16, 8, 128>({1, 32, 8, 128, 131072, 3}, false);
  measure<16, 8, 128>({1, 32, 8, 128, 32768, 3}, false);
  measure<16, 12>({1, 32, 8, 128, 131072, 0}, false);
  measure<16, 12>({1, 32, 8, 128, 131072, 3}, false);
  measure<16, 12>({1, 32, 8, 128, 32768, 3}, false);
  measure<16, 12>({8, 32, 8, 128, 32768, 3}, false);
}
