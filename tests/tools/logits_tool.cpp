// logits_tool MODEL TOKENS.safetensors OUT.safetensors [CHUNK]
// Logits of tokens [B, T] (tensor "tokens", float32 whole numbers) as tensor "logits" [B, T, vocab_size]; the tokens go through the
// model in chunks of CHUNK (0: in one go), so that caches are extended.
#include <fmt/format.h>

#include <cstdlib>
#include <exception>
#include <vector>

#include "mlx/ops.h"
#include "mlx/transforms.h"
#include "veloxquant/core/safetensors.h"
#include "veloxquant/model/attention.h"
#include "veloxquant/model/model.h"

using namespace veloxquant;

int main(int argc, char** argv) try {
  const std::vector<std::string> arguments(argv, argv + argc);
  const DeviceScope scope(mx::Device::cpu);
  const Model model = Model::load(arguments.at(1));
  const SafetensorsFile file(arguments.at(2));
  const Tensor tokens = to_float32(file.tensors().at("tokens"), "tokens", arguments[2]);
  const int batch = static_cast<int>(tokens.shape.at(0)), length = static_cast<int>(tokens.shape.at(1));
  const int chunk = argc > 4 && std::atoi(argv[4]) > 0 ? std::atoi(argv[4]) : length;
  const mx::array ids = mx::astype(mx::array(tokens.values.data(), {batch, length}), mx::int32);

  const AttentionCaches caches = model.make_caches(FullCache::factory());
  std::vector<mx::array> parts;
  for (int begin = 0; begin < length; begin += chunk) {
    parts.push_back(model.logits(model.forward(mx::slice(ids, {0, begin}, {batch, std::min(begin + chunk, length)}), caches)));
    mx::eval(parts.back());
  }
  const auto logits = mx::contiguous(mx::concatenate(parts, 1));
  mx::eval(logits);
  Tensor result{{batch, length, model.config().vocab_size}, {logits.data<float>(), logits.data<float>() + logits.size()}};
  write_safetensors(arguments.at(3), {{"logits", std::move(result)}}, {});
  return 0;
} catch (const std::exception& error) {
  fmt::print(stderr, "logits_tool: {}\n", error.what());
  return 1;
}
