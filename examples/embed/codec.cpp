// codec PLAN LAYER keys|values HEAD < vectors > restored: what a cache stored by the plan gives back of one head's vectors, rows of
// float32.  Their bytes and their error go to stderr.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <iterator>

#include "veloxquant/base.h"

using namespace veloxquant;

int main(int argc, char** argv) try {
  if (argc != 5) throw std::invalid_argument("usage: codec PLAN LAYER keys|values HEAD < vectors > restored");
  const int layer = std::stoi(argv[2]), head = std::stoi(argv[4]);
  const Plan plan = read_plan(argv[1]);
  const auto unit = std::find_if(plan.units.begin(), plan.units.end(), [&](const UnitPlan& unit) {
    return unit.layer == layer && to_string(unit.side) == argv[3] && unit.head.value_or(head) == head;
  });
  if (unit == plan.units.end()) throw std::invalid_argument("the plan has no such unit");
  const auto quantizer = make_quantizer(unit->quantizer);

  const std::string bytes(std::istreambuf_iterator<char>(std::cin), {});
  std::vector<float> vectors(bytes.size() / sizeof(float) / quantizer->dim() * quantizer->dim()), restored(vectors.size());
  std::memcpy(vectors.data(), bytes.data(), vectors.size() * sizeof(float));
  std::vector<std::uint8_t> encoded(quantizer->encoded_bytes(vectors.size() / quantizer->dim()));
  quantizer->encode(vectors, encoded);
  quantizer->decode(encoded, restored);

  double error = 0, square = 0;
  for (std::size_t i = 0; i < vectors.size(); ++i) {
    error += (restored[i] - vectors[i]) * (restored[i] - vectors[i]);
    square += vectors[i] * vectors[i];
  }
  std::fprintf(stderr, "%s: %zu bytes in %zu, relative error %.4f\n", unit->quantizer.method.c_str(), bytes.size(), encoded.size(),
               error / square);
  std::cout.write(reinterpret_cast<const char*>(restored.data()), static_cast<std::streamsize>(restored.size() * sizeof(float)));
} catch (const std::exception& error) {
  std::fprintf(stderr, "codec: %s\n", error.what());
  return 1;
}
