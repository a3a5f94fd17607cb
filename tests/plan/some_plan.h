// A small plan in which every quantizer occurs.
#pragma once

#include "veloxquant/plan/plan.h"

namespace veloxquant::testing {

inline Plan some_plan() {
  const auto unit = [](int layer, Side side, const char* method, std::map<std::string, std::int64_t> numbers,
                       std::map<std::string, Tensor> tensors = {}) {
    return UnitPlan{
        .layer = layer,
        .side = side,
        .quantizer = {.method = method, .side = side, .dim = 4, .numbers = std::move(numbers), .tensors = std::move(tensors)}};
  };
  Plan plan;
  plan.model = {.architecture = "llama",
                .num_layers = 2,
                .num_kv_heads = 3,
                .head_dim = 4,
                .hidden_size = 24,
                .vocab_size = 300,
                .config_hash = "c0",
                .weights_hash = "3e"};
  plan.units = {unit(0, Side::kKeys, "vecinfer", {{"num_subspaces", 2}, {"num_centroids", 2}},
                     {{"codebook", {{2, 2, 2}, {1, 2, 3, 4, -5, 6.5f, 7, 1e-30f}}}, {"smooth_factors", {{4}, {1, 0.5f, 2, 3}}}}),
                unit(0, Side::kValues, "affine", {{"bits", 2}, {"group_size", 64}}),
                unit(1, Side::kKeys, "turboquant", {{"bits", 3}, {"seed", 7}}), unit(1, Side::kValues, "kivi", {{"bits", 1}})};
  plan.provenance = {.program = "veloxquant 0.1.0",
                     .method = "vecinfer",
                     .units = "layer",
                     .bits = 2.25,
                     .context = 2048,
                     .texts = {{"book.txt", "ab01"}, {"ü \"2\".txt", "ab02"}},
                     .num_samples = 32,
                     .sequence_length = 512,
                     .seed = 18446744073709551615u,
                     .device = "cpu"};
  plan.predicted_kl = 0.1 / 3;
  return plan;
}

}  // namespace veloxquant::testing
