#include "veloxquant/generate/chat_prompt.h"

#include <fmt/ranges.h>

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
    const auto program = jinja::parse_from_tokens(tokens);
    jinja::context context(tokens.source);
    jinja::global_from_json(context, variables, /* mark_input= */ false);
    return jinja::render_string_parts(jinja::runtime::gather_string_parts(jinja::runtime(context).execute(program)));
  } catch (const std::exception& error) {
    throw_failure("chat template", "{}: {}", source, error.what());
  }
}

}  // namespace veloxquant
