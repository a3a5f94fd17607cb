#include "veloxquant/cli/options.h"

#include <charconv>
#include <cmath>
#include <map>

#include "veloxquant/core/error.h"
#include "veloxquant/plan/plan_file.h"
#include "veloxquant/text/text_file.h"

namespace veloxquant::cli {

void RunOptions::add_to(CLI::App& command, const std::string& remark) {
  command.add_option("--device", device, "Where the model runs; auto: the GPU where there is one" + remark)
      ->check(CLI::IsMember({"auto", "cpu", "gpu"}))
      ->capture_default_str();
  command.add_option("--seed", seed, "Seed of everything random; same seed, same result" + remark)
      ->check(whole_number(0, std::numeric_limits<std::uint64_t>::max()))
      ->capture_default_str();
}

void TextOptions::add_to(CLI::App& command) {
  command
      .add_option("--text", files,
                  "UTF-8 text file for the model to read; may be given several times (default: text that the model writes itself)")
      ->allow_extra_args(false);
}

void SampleOptions::add_to(CLI::App& command, const std::string& defaults) {
  auto* count = command
                    .add_option("--samples", num_samples,
                                defaults.empty() ? "Samples that the model reads"
                                                 : "Samples that the model reads (default: " + defaults + ")")
                    ->check(whole_number(1));
  auto* tokens = command.add_option("--length", length, "Tokens of a sample")->check(whole_number(1));
  if (!defaults.empty()) return;
  count->capture_default_str();
  tokens->capture_default_str();
}

std::vector<std::string> TextOptions::read() const {
  std::vector<std::string> texts;
  for (const auto& file : files) texts.push_back(read_text(file));
  return texts;
}

CLI::Validator positive_number() {
  return CLI::Validator(
      [](std::string& text) {
        double value = 0;
        const bool fits = CLI::detail::lexical_cast(text, value) && std::isfinite(value) && value > 0;
        return fits ? std::string() : fmt::format("expected a number above 0, got {}", excerpt(text));
      },
      "POSITIVE");
}

CLI::Validator whole_number(std::uint64_t least, std::uint64_t most) {
  return CLI::Validator(
      [least, most](std::string& text) {
        std::uint64_t value = 0;
        const char* end = text.data() + text.size();
        const auto [stop, error] = std::from_chars(text.data(), end, value);
        const bool fits = error == std::errc() && stop == end && value >= least && value <= most;
        return fits ? std::string() : fmt::format("expected a whole number from {} to {}, got {}", least, most, excerpt(text));
      },
      "WHOLE");
}

CLI::Validator token_count() {
  return CLI::Validator(
      [](std::string& text) {
        constexpr std::uint64_t kMost = kMaxContext;
        std::uint64_t value = 0;
        const char* end = text.data() + text.size();
        auto [stop, error] = std::from_chars(text.data(), end, value);
        const std::uint64_t unit = stop + 1 == end && *stop == 'k' ? 1024 : 1;
        if (unit > 1) ++stop;
        if (error != std::errc() || stop != end || value < 1 || value > kMost / unit)
          return fmt::format("expected a number of tokens from 1 to {}, such as 2048 or 32k, got {}", kMost, excerpt(text));
        text = std::to_string(value * unit);
        return std::string();
      },
      "TOKENS");
}

CLI::Validator byte_count() {
  return CLI::Validator(
      [](std::string& text) {
        static const std::map<std::string, double> units = {{"", 1.0},       {"B", 1.0},      {"KiB", 0x1p10}, {"MiB", 0x1p20},
                                                            {"GiB", 0x1p30}, {"TiB", 0x1p40}, {"KB", 1e3},     {"MB", 1e6},
                                                            {"GB", 1e9},     {"TB", 1e12}};
        constexpr double kMost = 0x1p60;
        double value = 0;
        const char* end = text.data() + text.size();
        auto [stop, error] = std::from_chars(text.data(), end, value, std::chars_format::fixed);
        while (stop != end && *stop == ' ') ++stop;
        const auto unit = units.find(std::string(stop, end));
        const double bytes = unit == units.end() ? 0 : value * unit->second;
        if (error != std::errc() || !(bytes >= 1 && bytes <= kMost))
          return fmt::format("expected a number of bytes above 0, such as 500000000 or 2GiB, got {}", excerpt(text));
        text = std::to_string(static_cast<std::int64_t>(bytes));
        return std::string();
      },
      "BYTES");
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

Plan read_plan_for(const Model& model, const std::string& folder, const std::string& path) {
  Plan plan = read_plan(path);
  try {
    check_identity(plan, model.identity());
  } catch (const std::runtime_error& error) {
    throw_failure("plan", "{} for {}: {}", path, folder, error.what());
  }
  return plan;
}

void print_json(const nlohmann::ordered_json& json) {
  // Names of files need not be UTF-8, and a result must not be lost for that.
  fmt::print("{}\n", json.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace));
}

std::string shell_word(const std::string& word) {
  constexpr const char* kPlain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./=+,:@%";
  if (!word.empty() && word.find_first_not_of(kPlain) == std::string::npos) return word;
  std::string quoted = "'";
  for (const char c : word) quoted += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return quoted + "'";
}

}  // namespace veloxquant::cli
