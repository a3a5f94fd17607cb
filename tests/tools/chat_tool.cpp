// chat_tool FOLDER        lines of messages, as JSON strings, to lines of what the chat template makes of them, or {"error": …}
#include <fmt/format.h>

#include <exception>
#include <iostream>
#include <nlohmann/json.hpp>
#include <string>

#include "veloxquant/generate/chat_prompt.h"

int main(int, char** argv) {
  for (std::string line; std::getline(std::cin, line);) {
    nlohmann::json made;
    try {
      made = veloxquant::chat_prompt(argv[1], nlohmann::json::parse(line).get<std::string>());
    } catch (const std::exception& error) {
      made = {{"error", error.what()}};
    }
    fmt::print("{}\n", made.dump());
  }
}
