#include "veloxquant/cli/options.h"

#include <cmath>

#include "veloxquant/core/error.h"
#include "veloxquant/core/file.h"

namespace veloxquant::cli {

void RunOptions::add_to(CLI::App& command) {
  command.add_option("--device", device, "Where the model runs; auto: the GPU where there is one")
      ->check(CLI::IsMember({"auto", "cpu", "gpu"}))
      ->capture_default_str();
  command.add_option("--seed", seed, "Seed of everything random; same seed, same result")->capture_default_str();
}

void TextOptions::add_to(CLI::App& command) {
  command
      .add_option("--text", files,
                  "UTF-8 text file for the model to read; may be given several times (default: text that the model writes itself)")
      ->allow_extra_args(false);
}

void SampleOptions::add_to(CLI::App& command) {
  command.add_option("--samples", num_samples, "Samples that the model reads")->check(CLI::PositiveNumber)->capture_default_str();
  command.add_option("--length", length, "Tokens of a sample")->check(CLI::PositiveNumber)->capture_default_str();
}

std::vector<std::string> TextOptions::read() const {
  std::vector<std::string> texts;
  for (const auto& file : files) texts.push_back(read_file(file));
  return texts;
}

CLI::Validator positive_number() {
  return CLI::Validator(
      [](std::string& text) {
        double value = 0;
        const bool fits = CLI::detail::lexical_cast(text, value) && std::isfinite(value) && value > 0;
        return fits ? std::string() : fmt::format("expected a number above 0, got {}", text);
      },
      "POSITIVE");
}

void add_json_flag(CLI::App& command, bool& json) {
  command.add_flag("--json", json, "Print JSON instead of a table");
}

LoadedModel load_model(const std::string& folder) {
  LoadedModel loaded{Model::load(folder), Tokenizer::load(folder)};
  const int tokens = loaded.tokenizer.vocabulary_size(), rows = loaded.model.config().vocab_size;
  if (tokens > rows)
    throw_failure("model", "{}: tokenizer.json has ids up to {}, the embedding has {} rows: they are not of one model", folder,
                  tokens - 1, rows);
  return loaded;
}

void print_json(const nlohmann::ordered_json& json) {
  fmt::print("{}\n", json.dump(2));
}

std::string shell_word(const std::string& word) {
  constexpr const char* kPlain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./=+,:@%";
  if (!word.empty() && word.find_first_not_of(kPlain) == std::string::npos) return word;
  std::string quoted = "'";
  for (const char c : word) quoted += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return quoted + "'";
}

}  // namespace veloxquant::cli
