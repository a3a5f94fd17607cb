// safetensors_tool IN.safetensors OUT.safetensors
// Reads a file with our reader and writes its tensors, as float32, and metadata with our writer.
#include <fmt/format.h>

#include <exception>

#include "veloxquant/core/safetensors.h"

using namespace veloxquant;

int main(int argc, char** argv) try {
  const std::vector<std::string> arguments(argv, argv + argc);
  const SafetensorsFile file(arguments.at(1));
  std::map<std::string, Tensor> tensors;
  for (const auto& [name, entry] : file.tensors()) tensors.emplace(name, to_float32(entry, name, arguments[1]));
  write_safetensors(arguments.at(2), tensors, file.metadata());
  return 0;
} catch (const std::exception& error) {
  fmt::print(stderr, "safetensors_tool: {}\n", error.what());
  return 1;
}
