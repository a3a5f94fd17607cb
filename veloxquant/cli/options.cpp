#include "veloxquant/cli/options.h"

#include "veloxquant/core/error.h"

namespace veloxquant::cli {

void RunOptions::add_to(CLI::App& command) {
  command.add_option("--device", device, "Where the model runs: auto is the GPU where there is one")
      ->check(CLI::IsMember({"auto", "cpu", "gpu"}))
      ->capture_default_str();
  command.add_option("--seed", seed, "Seed of everything random; same seed, same result")->capture_default_str();
  command.add_flag("--json", json, "Print JSON instead of a table");
}

void TextOptions::add_to(CLI::App& command) {
  command.add_option("--text", files, "UTF-8 text file to read; may be given several times; default: text the model writes itself");
  command.add_option("--length", length, "Tokens of a sample")->check(CLI::PositiveNumber)->capture_default_str();
}

LoadedModel load_model(const std::string& folder) {
  LoadedModel loaded{Model::load(folder), Tokenizer::load(folder)};
  const int tokens = loaded.tokenizer.vocabulary_size(), rows = loaded.model.config().vocab_size;
  if (tokens > rows)
    throw_failure("model", "{}: tokenizer.json has ids up to {}, but the embedding has {} rows: they are not of one model", folder, tokens - 1, rows);
  return loaded;
}

void print_json(const nlohmann::ordered_json& json) { fmt::print("{}\n", json.dump(2)); }

}  // namespace veloxquant::cli
