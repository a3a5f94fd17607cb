#include "veloxquant/evaluate/evaluate.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <filesystem>
#include <set>

#include "veloxquant/cli/commands.h"
#include "veloxquant/cli/options.h"
#include "veloxquant/cli/terminal.h"
#include "veloxquant/core/error.h"
#include "veloxquant/core/file.h"
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
  int windows = 0, length = 0, recall = 0, step = 1;
  std::optional<int> score_from;
  std::optional<std::string> logits, save_logits;
  std::set<int> contexts;
  TextOptions text;
  RunOptions run;
  bool packed = false, stepwise = false, json = false;

  // Of windows of `length` tokens.  Steps need something that they go on from.
  ScoringOptions scoring(int length) const {
    ScoringOptions scoring;
    scoring.score_from = score_from.value_or(stepwise ? length / 2 : 0);
    scoring.step = stepwise ? step : 0;
    return scoring;
  }
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
  return leading_windows(tokens_of(options.text, loaded.tokenizer), options.windows, length, loaded.tokenizer.prefix());
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

constexpr std::pair<const char*, double Measures::*> kMeasures[] = {
    {"perplexity", &Measures::perplexity}, {"perplexity_change", &Measures::perplexity_change},
    {"kl_mean", &Measures::kl_mean},       {"kl_median", &Measures::kl_median},
    {"kl_p99", &Measures::kl_p99},         {"kl_p999", &Measures::kl_p999},
    {"kl_max", &Measures::kl_max},         {"top1", &Measures::top1}};

void add_measures(const Measures& measures, const std::optional<Measures>& error, nlohmann::ordered_json& json) {
  for (const auto& [name, measure] : kMeasures) {
    json[name] = measures.*measure;
    json[fmt::format("{}_error", name)] = error ? nlohmann::ordered_json((*error).*measure) : nlohmann::ordered_json(nullptr);
  }
}

// What the row at `index` measures less what each other one does.
nlohmann::ordered_json differences_json(const std::vector<EvaluationRow>& rows, std::size_t index) {
  auto json = nlohmann::ordered_json::array();
  for (std::size_t other = 0; other < rows.size(); ++other) {
    if (other == index) continue;
    const auto& [value, error] = rows[index].differences[other];
    add_measures(value, error, json.emplace_back(nlohmann::ordered_json{{"storage", rows[other].storage}}));
  }
  return json;
}

// How all rows were scored.
struct Protocol {
  int windows, length;
  ScoringOptions scoring;
};

nlohmann::ordered_json row_json(const std::vector<EvaluationRow>& rows, std::size_t index, const Storage& storage,
                                const std::set<int>& contexts, const Protocol& protocol) {
  const EvaluationRow& row = rows[index];
  auto bits_at = nlohmann::ordered_json::object();
  for (const int context : contexts) bits_at[std::to_string(context)] = storage.effective_bits(context);
  nlohmann::ordered_json json = {{"storage", row.storage},
                                 {"effective_bits", row.effective_bits},
                                 {"bits_at", bits_at},
                                 {"constant_bytes", row.constant_bytes},
                                 {"sliding_bytes", row.sliding_bytes}};
  add_measures(row, row.error, json);
  json["kl_sampling_error"] = to_json(row.kl_sampling_error);
  json["recall"] = to_json(row.recall);
  json["recall_second"] = to_json(row.recall_second);
  json["differences"] = differences_json(rows, index);
  json["windows"] = protocol.windows;
  json["length"] = protocol.length;
  json["score_from"] = protocol.scoring.score_from;
  json["step"] = protocol.scoring.step;
  return json;
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

// "0.0399 ±0.0012", of `digits` behind the point.
std::string with_error(const EvaluationRow& row, double Measures::*measure, int digits, bool with_sign = false) {
  const auto value = with_sign ? fmt::format("{:+.{}f}", row.*measure, digits) : fmt::format("{:.{}f}", row.*measure, digits);
  return row.error ? fmt::format("{} ±{:.{}f}", value, (*row.error).*measure, digits) : value;
}

void print_rows(const std::vector<EvaluationRow>& rows, std::span<const Storage> storages, const std::set<int>& contexts) {
  const bool slide = std::any_of(rows.begin(), rows.end(), [](const EvaluationRow& row) { return row.sliding_bytes > 0; });
  const bool asked = rows[0].recall || rows[0].recall_second;
  std::vector<std::vector<std::string>> cells = {{"storage", "bits"}};
  for (const int context : contexts) cells[0].push_back("at " + context_text(context));
  cells[0].push_back("constant");
  if (slide) cells[0].push_back("sliding");
  for (const char* title : {"perplexity", "change", "KL", "top-1"}) cells[0].push_back(title);
  if (asked) cells[0].insert(cells[0].end(), {"recall", "recall 2"});
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const EvaluationRow& row = rows[i];
    auto& line = cells.emplace_back(std::vector<std::string>{row.storage, fmt::format("{:.4g}", row.effective_bits)});
    for (const int context : contexts) line.push_back(fmt::format("{:.4g}", storages[i].effective_bits(context)));
    line.push_back(bytes_if_any(row.constant_bytes));
    if (slide) line.push_back(bytes_if_any(static_cast<std::size_t>(row.sliding_bytes)));
    line.push_back(fmt::format("{:.3f}", row.perplexity));
    line.push_back(with_error(row, &Measures::perplexity_change, 3, /* with_sign= */ true));
    line.push_back(with_error(row, &Measures::kl_mean, 4));
    line.push_back(with_error(row, &Measures::top1, 3));
    if (asked) line.insert(line.end(), {share_text(row.recall), share_text(row.recall_second)});
  }
  fmt::print("{}\n", table(cells));
  if (slide)
    fmt::print("Bits count the layers that are stored; sliding is what the other layers keep beside, at full precision.\n\n");
}

// How KL is spread over positions, and how much more of it each storage has than the first one, on the same windows.
void print_spread(const std::vector<EvaluationRow>& rows) {
  if (rows.size() < 2) return;
  const bool compared = rows.size() > 2;
  std::vector<std::vector<std::string>> cells = {{"KL of", "median", "99 %", "99.9 %", "maximum"}};
  if (compared) cells[0].push_back("mean less " + rows[1].storage + "'s");
  for (std::size_t i = 1; i < rows.size(); ++i) {
    const EvaluationRow& row = rows[i];
    auto& line = cells.emplace_back(
        std::vector<std::string>{row.storage, with_error(row, &Measures::kl_median, 5), with_error(row, &Measures::kl_p99, 3),
                                 with_error(row, &Measures::kl_p999, 3), fmt::format("{:.2f}", row.kl_max)});
    if (!compared) continue;
    const auto& [value, error] = row.differences[1];
    line.push_back(i == 1   ? "–"
                   : !error ? fmt::format("{:+.4f}", value.kl_mean)
                            : fmt::format("{:+.4f} ±{:.4f}", value.kl_mean, error->kl_mean));
  }
  fmt::print("{}\n", table(cells));
}

std::string protocol_text(const Protocol& protocol, bool own_text, bool prefixed) {
  const auto& [windows, length, scoring] = protocol;
  std::string text = fmt::format("{} {} of {} tokens{}{}", windows, windows == 1 ? "window" : "windows", length,
                                 own_text ? " of the model's own text" : "",
                                 prefixed ? ", each behind the begin of text that the tokenizer adds" : "");
  if (scoring.score_from > 0) text += fmt::format(", scored from {} on", scoring.score_from);
  if (scoring.step > 0) text += fmt::format(", {} at a time as when text is written", scoring.step);
  text += "; KL in nats a token against full precision";
  return text + (windows > 1 ? "; ± standard error over windows (--json has all).\n" : ".\n");
}

void run(const Options& options) {
  end_soon_at_interrupt();
  const DeviceScope scope = options.run.enter();
  const LoadedModel loaded = load_model(options.model);
  const int longest = loaded.model.config().max_position_embeddings,
            length = options.length > 0 ? options.length : std::min(longest, kLongestWindow);
  ScoringOptions scoring = options.scoring(length);
  check_scoring(scoring, length);
  if (length > longest)
    warn(fmt::format("windows of {} tokens, and the model was made for {}: what lies beyond may make no sense", length, longest));
  const auto progress = terminal_progress();
  // Plans and texts are read before anything that takes long.
  auto storages = storages_of_plans(options, loaded.model);
  SavedLogits logits;
  if (options.logits) logits = read_logits(*options.logits);
  if (options.save_logits) check_writable(*options.save_logits);
  const TokenBatch windows = windows_of(options, loaded, length, progress);
  if (options.logits) {
    check_logits(logits, loaded.model, windows, scoring.score_from);
    scoring.logits = &logits;
  } else if (options.save_logits) {
    scoring.save = &logits;
  }
  for (const auto& name : options.peers) storages.push_back(peer_storage(name, loaded.model, progress));
  const auto filler = text_of(windows, loaded.tokenizer.prefix());
  const auto documents = [&](Wording wording) {
    return options.recall > 0
               ? make_recall_documents(loaded.tokenizer, filler, options.recall, length, options.run.seed, wording, progress)
               : std::vector<RecallDocument>();
  };
  const auto rows = evaluate(loaded.model, windows, std::span(storages).subspan(1),
                             {documents(Wording::kFirst), documents(Wording::kSecond)}, progress, scoring);
  if (options.save_logits) write_logits(logits, *options.save_logits);
  clear_progress();
  const Protocol protocol{windows.count, length, scoring};
  if (options.json) {
    auto json = nlohmann::ordered_json::array();
    for (std::size_t i = 0; i < rows.size(); ++i) json.push_back(row_json(rows, i, storages[i], options.contexts, protocol));
    return print_json(json);
  }
  print_rows(rows, storages, options.contexts);
  print_spread(rows);
  const bool own_text = options.text.files.empty();
  fmt::print("{}", protocol_text(protocol, own_text, !own_text && !loaded.tokenizer.prefix().empty()));
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
      .add_option("--score-from", options->score_from,
                  "First position that is scored; those before it are read (default: 0, with --stepwise half a window)")
      ->check(whole_number(0));
  auto* stepwise =
      command.add_flag("--stepwise", options->stepwise,
                       "Read the scored positions token by token, with each storage as it is when text is written, and "
                       "not a window in one go");
  command.add_option("--step", options->step, "With --stepwise: tokens that are read at once")
      ->check(whole_number(1))
      ->needs(stepwise)
      ->capture_default_str();
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
  auto* save =
      command.add_option("--save-logits", options->save_logits,
                         "Write full precision's logits into this file: of each position the likeliest tokens and some drawn "
                         "from the others");
  command
      .add_option("--logits", options->logits, "Compare with the full precision that --save-logits wrote, which is then not run")
      ->excludes(save);
  options->text.add_to(command);
  options->run.add_to(command);
  add_json_flag(command, options->json);
  command.callback([options] { run(*options); });
}

}  // namespace veloxquant::cli
