#include "veloxquant/evaluate/evaluate.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <filesystem>
#include <set>

#include "veloxquant/cli/commands.h"
#include "veloxquant/cli/options.h"
#include "veloxquant/cli/terminal.h"
#include "veloxquant/core/error.h"
#include "veloxquant/core/random.h"
#include "veloxquant/core/warning.h"
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
  std::set<int> contexts;
  TextOptions text;
  RunOptions run;
  bool packed = false, json = false;
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

// Full precision first.
std::vector<Storage> storages_of_plans(const Options& options, const Model& model) {
  std::vector<Storage> storages = {full_storage()};
  for (const auto& path : options.plans)
    storages.push_back(
        plan_storage(std::filesystem::path(path).filename().string(), read_plan_for(model, options.model, path), options.packed));
  return storages;
}

nlohmann::ordered_json to_json(const std::optional<double>& share) {
  return share ? nlohmann::ordered_json(*share) : nlohmann::ordered_json(nullptr);
}

nlohmann::ordered_json to_json(const EvaluationRow& row, const Storage& storage, const std::set<int>& contexts) {
  auto bits_at = nlohmann::ordered_json::object();
  for (const int context : contexts) bits_at[std::to_string(context)] = storage.effective_bits(context);
  return {{"storage", row.storage},
          {"effective_bits", row.effective_bits},
          {"bits_at", bits_at},
          {"constant_bytes", row.constant_bytes},
          {"sliding_bytes", row.sliding_bytes},
          {"perplexity", row.perplexity},
          {"kl_mean", row.kl_mean},
          {"kl_p999", row.kl_p999},
          {"top1", row.top1},
          {"recall", to_json(row.recall)},
          {"recall_second", to_json(row.recall_second)}};
}

std::string context_text(int context) {
  return context % 1024 == 0 ? fmt::format("{}k", context / 1024) : std::to_string(context);
}

std::string bytes_if_any(std::size_t bytes) {
  return bytes > 0 ? bytes_text(bytes) : "–";
}

std::string share_text(const std::optional<double>& share) {
  return share ? fmt::format("{:.3f}", *share) : "–";
}

void print_rows(const std::vector<EvaluationRow>& rows, std::span<const Storage> storages, const std::set<int>& contexts) {
  const bool slide = std::any_of(rows.begin(), rows.end(), [](const EvaluationRow& row) { return row.sliding_bytes > 0; });
  std::vector<std::vector<std::string>> cells = {{"storage", "bits"}};
  for (const int context : contexts) cells[0].push_back("at " + context_text(context));
  cells[0].push_back("constant");
  if (slide) cells[0].push_back("sliding");
  for (const char* title : {"perplexity", "KL", "KL 99.9 %", "top-1", "recall", "recall 2"}) cells[0].push_back(title);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const EvaluationRow& row = rows[i];
    auto& line = cells.emplace_back(std::vector<std::string>{row.storage, fmt::format("{:.4g}", row.effective_bits)});
    for (const int context : contexts) line.push_back(fmt::format("{:.4g}", storages[i].effective_bits(context)));
    line.push_back(bytes_if_any(row.constant_bytes));
    if (slide) line.push_back(bytes_if_any(static_cast<std::size_t>(row.sliding_bytes)));
    line.push_back(fmt::format("{:.3f}", row.perplexity));
    line.push_back(fmt::format("{:.4f}", row.kl_mean));
    line.push_back(fmt::format("{:.3f}", row.kl_p999));
    line.push_back(fmt::format("{:.3f}", row.top1));
    line.push_back(share_text(row.recall));
    line.push_back(share_text(row.recall_second));
  }
  fmt::print("{}\n", table(cells));
  if (slide)
    fmt::print("Bits count the layers that are stored; sliding is what the other layers keep beside, at full precision.\n");
}

void run(const Options& options) {
  end_soon_at_interrupt();
  const DeviceScope scope = options.run.enter();
  const LoadedModel loaded = load_model(options.model);
  const int longest = loaded.model.config().max_position_embeddings,
            length = options.length > 0 ? options.length : std::min(longest, kLongestWindow);
  if (length > longest)
    warn(fmt::format("windows of {} tokens, and the model was made for {}: what lies beyond may make no sense", length, longest));
  const auto progress = terminal_progress();
  // Plans and texts are read before anything that takes long.
  auto storages = storages_of_plans(options, loaded.model);
  const TokenBatch windows = windows_of(options, loaded, length, progress);
  for (const auto& name : options.peers) storages.push_back(peer_storage(name, loaded.model, progress));
  const auto documents = [&](Wording wording) {
    return options.recall > 0 ? make_recall_documents(loaded.tokenizer, windows.tokens, options.recall, length, options.run.seed,
                                                      wording, progress)
                              : std::vector<RecallDocument>();
  };
  const auto rows = evaluate(loaded.model, windows, std::span(storages).subspan(1),
                             {documents(Wording::kFirst), documents(Wording::kSecond)}, progress);
  clear_progress();
  if (options.json) {
    auto json = nlohmann::ordered_json::array();
    for (std::size_t i = 0; i < rows.size(); ++i) json.push_back(to_json(rows[i], storages[i], options.contexts));
    return print_json(json);
  }
  print_rows(rows, storages, options.contexts);
  fmt::print("{} windows of {} tokens{}; KL in nats a token against full precision.\n", windows.count, length,
             options.text.files.empty() ? " of the model's own text" : "");
  if (options.plans.empty()) fmt::print("Next: veloxquant calibrate {} -o plan.safetensors\n", shell_word(options.model));
}

// The names without a window, and how to ask for one.
std::string peers_text() {
  auto names = peer_names();
  std::erase_if(names, [](const std::string& name) { return name.find('+') != std::string::npos; });
  return fmt::format("Peers: {}; all but vecinfer also as NAME+window, which keeps the last 32 and first 4 tokens at 8 bits",
                     fmt::join(names, ", "));
}

}  // namespace

void add_evaluate(CLI::App& program) {
  auto options = std::make_shared<Options>();
  CLI::App& command =
      *program.add_subcommand("evaluate", "Measure what a model still knows with its cache stored by plans and peers");
  command.footer("Example: veloxquant evaluate MODEL --plan plan.safetensors --peer mlx4 --text book.txt --windows 8\n" +
                 peers_text());
  command.add_option("model", options->model, "Model folder: config.json, *.safetensors, tokenizer.json")->required();
  command.add_option("--plan", options->plans, "Plan file; may be given several times")->allow_extra_args(false);
  command.add_flag("--packed", options->packed,
                   "Store plans really packed, as generate does, and not only as what would be read back");
  command.add_option("--peer", options->peers, "Another way of storing a cache; may be given several times")
      ->allow_extra_args(false)
      ->check(CLI::IsMember(peer_names()).description("PEER"));
  command.add_option("--windows", options->windows, "Windows of text to score (default: all of the text, or 8 of own text)")
      ->check(whole_number(1));
  command.add_option("--length", options->length, "Tokens of a window (default: the model's maximum, at most 2048)")
      ->check(whole_number(2));
  command
      .add_option(
          "--recall", options->recall,
          "Documents with facts sown in the text that is evaluated, asked for at their end; as many again in a second wording")
      ->check(whole_number(1));
  command
      .add_option(
          "--context", options->contexts,
          "Tokens, such as 2048 or 32k, at which effective bits are counted beside those at the length of a window; may be given "
          "several times")
      ->allow_extra_args(false)
      ->transform(token_count());
  options->text.add_to(command);
  options->run.add_to(command);
  add_json_flag(command, options->json);
  command.callback([options] { run(*options); });
}

}  // namespace veloxquant::cli
