#include "veloxquant/generate/generate.h"

#include <fmt/format.h>

#include <cstdio>

#include "veloxquant/cache/packed_cache.h"
#include "veloxquant/cli/commands.h"
#include "veloxquant/cli/options.h"
#include "veloxquant/cli/terminal.h"
#include "veloxquant/core/error.h"
#include "veloxquant/generate/chat_prompt.h"
#include "veloxquant/model/attention.h"
#include "veloxquant/text/text_file.h"

namespace veloxquant::cli {
namespace {

struct Options {
  std::string model;
  std::optional<std::string> plan, prompt, prompt_file;
  GenerateOptions generate;
  RunOptions run;
  bool ignore_eos = false, chat = false, json = false;

  std::string prompt_text() const {
    if (prompt.has_value() == prompt_file.has_value()) throw CLI::RequiredError("One of --prompt and --prompt-file");
    return prompt ? *prompt : read_text(*prompt_file);
  }
};

void show(const std::string& text) {
  if (text.empty()) return;
  fmt::print("{}", text);
  if (std::fflush(stdout) != 0) throw_failure("generate", "could not write to standard output");
}

void run(const Options& options) {
  const std::string text = options.prompt_text();  // before anything that takes long
  end_soon_at_interrupt();
  const DeviceScope scope = options.run.enter();
  const LoadedModel loaded = load_model(options.model);
  std::optional<Plan> plan;
  if (options.plan) plan = read_plan_for(loaded.model, options.model, *options.plan);
  const auto prompt = options.chat ? loaded.tokenizer.encode(chat_prompt(options.model, text))
                                   : loaded.tokenizer.encode(text, /* add_special_tokens= */ true);
  GenerateOptions wanted = options.generate;
  wanted.seed = options.run.seed;
  if (!options.ignore_eos) wanted.stop_tokens = read_stop_tokens(options.model, loaded.model.config());
  TextStream stream(loaded.tokenizer);
  const auto progress = terminal_progress();
  std::size_t written = 0;
  const auto on_token = [&](std::int32_t token) {
    check_interrupt();
    if (options.json) {
      progress("writing", ++written, static_cast<std::size_t>(wanted.max_tokens));
    } else {
      clear_progress();
      show(stream.add(token));
    }
    return true;
  };
  const auto made = generate(loaded.model, prompt, plan ? packed_factory(*plan) : FullCache::factory(), wanted, on_token, progress);
  clear_progress();
  const std::size_t codebooks = plan ? constant_bytes(*plan) : 0;
  const auto& config = loaded.model.config();
  const double elements = 2.0 * config.num_layers * config.num_kv_heads * config.head_dim * made.tokens_in_cache,
               bits = 8.0 * static_cast<double>(made.cache_bytes) / elements;
  if (options.json)
    return print_json({{"text", loaded.tokenizer.decode(made.tokens)},
                       {"prompt_tokens", prompt.size()},
                       {"tokens", made.tokens.size()},
                       {"stopped", made.stopped},
                       {"tokens_in_cache", made.tokens_in_cache},
                       {"cache_bytes", made.cache_bytes},
                       {"codebook_bytes", codebooks},
                       {"effective_bits", bits},
                       {"kernels", made.kernels},
                       {"tokens_per_second", made.tokens_per_second},
                       {"seconds_to_first_token", made.seconds_to_first_token}});
  show(stream.finish());
  fmt::print(stderr, "\n\n{} tokens, {:.1f} tokens/s, first after {:.2f} s; cache of {} tokens: {}, {:.3g} bits per element{}\n",
             made.tokens.size(), made.tokens_per_second, made.seconds_to_first_token, made.tokens_in_cache,
             bytes_text(made.cache_bytes), bits,
             codebooks > 0 ? fmt::format("; {} of codebooks beside", bytes_text(codebooks)) : "");
}

}  // namespace

void add_generate(CLI::App& program) {
  auto options = std::make_shared<Options>();
  CLI::App& command = *program.add_subcommand("generate", "Let a model write, with its cache stored as a plan says");
  command.footer("Example: veloxquant generate MODEL --plan plan.safetensors --prompt \"It was a dark night\" --max-tokens 200");
  command.add_option("model", options->model, "Model folder: config.json, *.safetensors, tokenizer.json")->required();
  command.add_option("--plan", options->plan, "Plan file (default: the cache in float32)");
  auto* prompt = command.add_option("--prompt", options->prompt, "Text to go on from");
  command.add_option("--prompt-file", options->prompt_file, "UTF-8 text file to go on from, read as it is, line ends and all")
      ->excludes(prompt);
  command.add_flag("--chat", options->chat, "Hand the prompt over as a user's message, in the chat template of the model's folder");
  command.add_option("--max-tokens", options->generate.max_tokens, "Tokens to write at most")
      ->check(whole_number(1))
      ->capture_default_str();
  command.add_flag("--ignore-eos", options->ignore_eos,
                   "Write on where the model would end, always --max-tokens: to measure speed and memory");
  command.add_option("--temperature", options->generate.temperature, "0 takes the likeliest token, 1 draws as the model says")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command.add_option("--top-p", options->generate.top_p, "Draw only from the likeliest tokens that have so much together")
      ->check(positive_number())
      ->capture_default_str();
  options->run.add_to(command);
  add_json_flag(command, options->json);
  command.callback([options] { run(*options); });
}

}  // namespace veloxquant::cli
