// tokenize_tool FOLDER [--special]        lines of text, as hexadecimal bytes, to lines of tokens
// tokenize_tool FOLDER --decode [--keep]  lines of tokens to lines of text, as hexadecimal bytes; --keep: special tokens too
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "veloxquant/text/tokenizer.h"

using namespace veloxquant;

std::string from_hex(const std::string& line) {
  std::string bytes;
  for (std::size_t i = 0; i + 1 < line.size(); i += 2) bytes += static_cast<char>(std::stoi(line.substr(i, 2), nullptr, 16));
  return bytes;
}

std::string to_hex(const std::string& bytes) {
  std::string line;
  for (const char c : bytes) line += fmt::format("{:02x}", static_cast<unsigned char>(c));
  return line;
}

std::vector<std::int32_t> parse_tokens(const std::string& line) {
  std::istringstream stream(line);
  std::vector<std::int32_t> tokens;
  for (std::int32_t token = 0; stream >> token;) tokens.push_back(token);
  return tokens;
}

int main(int argc, char** argv) try {
  const std::vector<std::string> arguments(argv, argv + argc);
  const auto has = [&](const char* flag) { return std::find(arguments.begin(), arguments.end(), flag) != arguments.end(); };
  const Tokenizer tokenizer = Tokenizer::load(arguments.at(1));
  for (std::string line; std::getline(std::cin, line);) {
    if (has("--decode")) {
      fmt::print("{}\n", to_hex(tokenizer.decode(parse_tokens(line), !has("--keep"))));
    } else {
      fmt::print("{}\n", fmt::join(tokenizer.encode(from_hex(line), has("--special")), " "));
    }
  }
  return 0;
} catch (const std::exception& error) {
  fmt::print(stderr, "tokenize_tool: {}\n", error.what());
  return 1;
}
