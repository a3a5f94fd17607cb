#include "veloxquant/generate/chat_prompt.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <set>
#include <vector>

#include "jinja/lexer.h"
#include "jinja/parser.h"
#include "jinja/runtime.h"
#include "json.h"
#include "veloxquant/core/error.h"
#include "veloxquant/core/file.h"
#include "veloxquant/core/json.h"

namespace veloxquant {
namespace {

constexpr std::size_t kMaxTemplateBytes = std::size_t{1} << 20;
constexpr std::size_t kMostNesting = 250;  // templates in use have up to 30; a stack of 8 MB holds some thousands
constexpr const char* kField = "chat_template";

struct Template {
  std::string source, text;  // source: where it is, for messages
};

// Null where the file is not there.
nlohmann::json read_if_there(const std::filesystem::path& path) {
  return std::filesystem::exists(path) ? read_json(path) : nlohmann::json();
}

// One template, or several with names.
Template template_of(const nlohmann::json& json, const std::string& source) {
  const JsonObject object(json, source);
  const auto& field = object.at(kField);
  if (field.is_string()) return {source, field.get<std::string>()};
  if (!field.is_array()) object.refuse(kField, "a template or a list of named templates");
  std::vector<std::string> names;
  for (const auto& item : field) {
    const JsonObject named(item, source + ": " + kField);
    names.push_back(named.string("name"));
    if (names.back() == "default") return {source, named.string("template")};
  }
  throw_failure("chat template", "{}: expected a template named default, got {}", source, fmt::join(names, ", "));
}

Template find_template(const std::filesystem::path& folder, const nlohmann::json& config, const std::string& config_source) {
  const auto file = folder / "chat_template.jinja", json_file = folder / "chat_template.json";
  if (std::filesystem::exists(file)) return {file.string(), read_file(file, kMaxTemplateBytes)};
  const auto has = [](const nlohmann::json& json) { return json.is_object() && json.contains(kField) && !json[kField].is_null(); };
  if (has(config)) return template_of(config, config_source);
  if (const auto json = read_if_there(json_file); has(json)) return template_of(json, json_file.string());
  throw_failure("chat template",
                "{}: the model has none: there is no {} in tokenizer_config.json, and no chat_template.jinja or chat_template.json",
                folder.string(), kField);
}

// Names of special tokens → their text, from a tokenizer's configuration or its map of special tokens.
void add_special_tokens(const nlohmann::json& json, nlohmann::ordered_json& variables) {
  if (!json.is_object()) return;
  for (const auto& [name, value] : json.items()) {
    if (!name.ends_with("_token") || variables.contains(name)) continue;
    const auto& content = value.is_object() && value.contains("content") ? value["content"] : value;
    if (content.is_string()) variables[name] = content.get<std::string>();
  }
}

// Whether the token, which is not the name of a statement, may make its expression deeper.
bool deepens(const jinja::token& some) {
  using jinja::token;
  static const std::set<std::string> words = {"and", "or", "not", "in", "is", "if"};
  switch (some.t) {
    case token::open_paren:
    case token::open_square_bracket:
    case token::open_curly_bracket:
    case token::dot:
    case token::pipe:
    case token::additive_binary_operator:
    case token::multiplicative_binary_operator:
    case token::comparison_binary_operator:
    case token::unary_operator:
      return true;
    case token::identifier:
      return words.contains(some.value);
    default:
      return false;
  }
}

// Whether the statement whose name is there goes on to an end of its own.
bool opens_block(const std::vector<jinja::token>& tokens, std::size_t name) {
  using jinja::token;
  static const std::set<std::string> blocks = {"if", "for", "macro", "call", "filter"};
  if (tokens[name].value != "set") return blocks.contains(tokens[name].value);
  // One without a value: what has its "=" in parentheses, of arguments, has none.
  const auto from = tokens.begin() + static_cast<std::ptrdiff_t>(name);
  const auto found = std::find_if(from, tokens.end(), [](const token& some) {
    return some.t == token::equals || some.t == token::open_paren || some.t == token::close_statement ||
           some.t == token::open_statement;
  });
  return found == tokens.end() || found->t != token::equals;
}

// The engine reads, runs and frees what is nested by functions that call themselves: what would overflow the stack is refused.
// Counted is at least how deep it is: the blocks that are open, each elif as one more, and all operators and brackets of a tag.
void check_nesting(const std::vector<jinja::token>& tokens) {
  using jinja::token;
  static const std::set<std::string> ends = {"endif", "endfor", "endmacro", "endcall", "endfilter", "endset"};
  std::vector<std::size_t> blocks{0};  // how deep is what stands in each
  std::size_t depth = 0;
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    if (i > 0 && tokens[i - 1].t == token::open_statement) {
      if (opens_block(tokens, i))
        blocks.push_back(blocks.back() + 1);
      else if (tokens[i].value == "elif")
        ++blocks.back();
      else if (ends.contains(tokens[i].value) && blocks.size() > 1)
        blocks.pop_back();
      depth = blocks.back();
    } else if (tokens[i].t == token::open_expression) {
      depth = blocks.back();
    } else if (deepens(tokens[i])) {
      ++depth;
    }
    if (depth > kMostNesting)
      throw std::runtime_error(fmt::format("expected blocks, brackets and operators at most {} deep, got more", kMostNesting));
  }
}

}  // namespace

std::string chat_prompt(const std::filesystem::path& folder, std::string_view message) {
  const auto config_file = folder / "tokenizer_config.json";
  const auto config = read_if_there(config_file);
  const auto [source, text] = find_template(folder, config, config_file.string());
  nlohmann::ordered_json variables = {{"messages", nlohmann::ordered_json::array({{{"role", "user"}, {"content", message}}})},
                                      {"add_generation_prompt", true},
                                      {"tools", nullptr},
                                      {"documents", nullptr}};
  add_special_tokens(config, variables);
  add_special_tokens(read_if_there(folder / "special_tokens_map.json"), variables);
  try {
    const auto tokens = jinja::lexer().tokenize(text);
    check_nesting(tokens.tokens);
    const auto program = jinja::parse_from_tokens(tokens);
    jinja::context context(tokens.source);
    jinja::global_from_json(context, variables, /* mark_input= */ false);
    return jinja::render_string_parts(jinja::runtime::gather_string_parts(jinja::runtime(context).execute(program)));
  } catch (const std::exception& error) {
    throw_failure("chat template", "{}: {}", source, error.what());
  }
}

}  // namespace veloxquant
