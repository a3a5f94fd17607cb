#include "veloxquant/evaluate/evaluate.h"

#include <fmt/ranges.h>

#include <filesystem>

#include "veloxquant/cache/restoring_cache.h"
#include "veloxquant/cli/commands.h"
#include "veloxquant/cli/options.h"
#include "veloxquant/cli/terminal.h"
#include "veloxquant/core/error.h"
#include "veloxquant/core/random.h"
#include "veloxquant/generate/own_text.h"

namespace veloxquant::cli {
namespace {

// Windows of the model's own text where there is no other: as much as tells peers apart in a minute.
constexpr int kOwnWindows = 8;
constexpr int kLongestWindow = 2048;

// With the same --seed, what is evaluated on is still another text than what was calibrated on.
constexpr std::uint64_t kEvaluationStream = 1;

struct Options {
  std::string model;
  std::vector<std::string> plans, peers;
  int windows = 0, length = 0, recall = 0;
  TextOptions text;
  RunOptions run;
  bool json = false;
};

std::vector<std::int32_t> tokens_of(const TextOptions& text, const Tokenizer& tokenizer) {
  std::vector<std::int32_t> tokens;
  for (const auto& content : text.read()) {
    const auto more = tokenizer.encode(content);
    tokens.insert(tokens.end(), more.begin(), more.end());
  }
  return tokens;
}

TokenBatch windows_of(const Options& options, const LoadedModel& loaded, int length, const ProgressCallback& progress) {
  if (options.text.files.empty()) {
    const std::uint64_t seed = Random(options.run.seed, kEvaluationStream).next();
    return generate_own_text(loaded.model, options.windows > 0 ? options.windows : kOwnWindows, length, seed, progress);
  }
  return leading_windows(tokens_of(options.text, loaded.tokenizer), options.windows, length);
}

std::vector<Storage> storages_of(const Options& options, const Model& model) {
  std::vector<Storage> storages;
  for (const auto& path : options.plans) {
    const Plan plan = read_plan_for(model, options.model, path);
    storages.push_back({std::filesystem::path(path).filename().string(), effective_bits(plan), restoring_factory(plan)});
  }
  for (const auto& name : options.peers) storages.push_back(peer_storage(name, model.config()));
  return storages;
}

nlohmann::ordered_json to_json(const EvaluationRow& row) {
  nlohmann::ordered_json json = {{"storage", row.storage},       {"effective_bits", row.effective_bits},
                                 {"perplexity", row.perplexity}, {"kl_mean", row.kl_mean},
                                 {"kl_p999", row.kl_p999},       {"top1", row.top1}};
  json["recall"] = row.recall ? nlohmann::ordered_json(*row.recall) : nlohmann::ordered_json(nullptr);
  return json;
}

void print_rows(const std::vector<EvaluationRow>& rows) {
  std::vector<std::vector<std::string>> cells = {{"storage", "bits", "perplexity", "KL", "KL 99.9 %", "top-1", "recall"}};
  for (const auto& row : rows)
    cells.push_back({row.storage, fmt::format("{:.4g}", row.effective_bits), fmt::format("{:.3f}", row.perplexity),
                     fmt::format("{:.4f}", row.kl_mean), fmt::format("{:.3f}", row.kl_p999), fmt::format("{:.3f}", row.top1),
                     row.recall ? fmt::format("{:.3f}", *row.recall) : "–"});
  fmt::print("{}", table(cells));
}

void run(const Options& options) {
  const DeviceScope scope = options.run.enter();
  const LoadedModel loaded = load_model(options.model);
  const int longest = loaded.model.config().max_position_embeddings,
            length = options.length > 0 ? options.length : std::min(longest, kLongestWindow);
  if (length > longest) throw_invalid("evaluate", "length: expected at most {} (the model's maximum), got {}", longest, length);
  const auto storages = storages_of(options, loaded.model);
  const auto progress = terminal_progress();
  const TokenBatch windows = windows_of(options, loaded, length, progress);
  std::vector<RecallDocument> documents;
  if (options.recall > 0)
    documents = make_recall_documents(loaded.tokenizer, windows.tokens, options.recall, length, options.run.seed, progress);
  const auto rows = evaluate(loaded.model, windows, storages, documents, progress);
  clear_progress();
  if (options.json) {
    auto json = nlohmann::ordered_json::array();
    for (const auto& row : rows) json.push_back(to_json(row));
    return print_json(json);
  }
  print_rows(rows);
  fmt::print("\n{} windows of {} tokens{}; KL in nats a token against full precision.\n", windows.count, length,
             options.text.files.empty() ? " of the model's own text" : "");
  if (options.plans.empty()) fmt::print("Next: veloxquant calibrate {} -o plan.safetensors\n", shell_word(options.model));
}

}  // namespace

void add_evaluate(CLI::App& program) {
  auto options = std::make_shared<Options>();
  CLI::App& command =
      *program.add_subcommand("evaluate", "Measure what a model still knows with its cache stored by plans and peers");
  command.footer("Example: veloxquant evaluate MODEL --plan plan.safetensors --peer mlx4 --text book.txt --windows 8\nPeers: " +
                 fmt::format("{}", fmt::join(peer_names(), ", ")));
  command.add_option("model", options->model, "Model folder: config.json, *.safetensors, tokenizer.json")->required();
  command.add_option("--plan", options->plans, "Plan file; may be given several times")->allow_extra_args(false);
  command.add_option("--peer", options->peers, "Another way of storing a cache; may be given several times")
      ->allow_extra_args(false)
      ->check(CLI::IsMember(peer_names()));
  command.add_option("--windows", options->windows, "Windows of text to score (default: all of the text, or 8 of own text)")
      ->check(whole_number(1));
  command.add_option("--length", options->length, "Tokens of a window (default: the model's maximum, at most 2048)")
      ->check(whole_number(2));
  command
      .add_option("--recall", options->recall, "Documents with facts sown in the text that is evaluated, asked for at their end")
      ->check(whole_number(1));
  options->text.add_to(command);
  options->run.add_to(command);
  add_json_flag(command, options->json);
  command.callback([options] { run(*options); });
}

}  // namespace veloxquant::cli
