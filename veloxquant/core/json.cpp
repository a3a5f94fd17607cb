#include "veloxquant/core/json.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "veloxquant/core/error.h"
#include "veloxquant/core/file.h"

namespace veloxquant {
namespace {

using nlohmann::json;

constexpr std::size_t kMaxDepth = 64;
constexpr std::size_t kShownProblem = 200;

std::string shown(const json& value) {
  return excerpt(value.dump(-1, ' ', true, json::error_handler_t::replace));
}

// Walks the text without building anything, so that what is too deep or has a key twice is refused before memory is spent on it.
class Checker : public nlohmann::json_sax<json> {
 public:
  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(json::number_integer_t) override { return true; }
  bool number_unsigned(json::number_unsigned_t) override { return true; }
  bool number_float(json::number_float_t, const std::string&) override { return true; }
  bool string(std::string&) override { return true; }
  bool binary(json::binary_t&) override { return true; }
  bool start_object(std::size_t) override { return enter(); }
  bool key(std::string& name) override {
    if (keys_.back().insert(name).second) return true;
    problem = fmt::format("key {} stands twice in one object", shown(name));
    return false;
  }
  bool end_object() override { return leave(); }
  bool start_array(std::size_t) override { return enter(); }
  bool end_array() override { return leave(); }
  bool parse_error(std::size_t position, const std::string&, const json::exception& error) override {
    // The parser's words quote the text, which may be endless and, where that is what is wrong, not UTF-8.
    std::string words = std::string(error.what()).substr(0, kShownProblem);
    std::replace_if(
        words.begin(), words.end(), [](unsigned char c) { return c >= 0x80; }, '?');
    problem = fmt::format("not valid JSON at byte {}: {}", position, words);
    return false;
  }

  std::string problem;

 private:
  bool enter() {
    keys_.emplace_back();
    if (keys_.size() <= kMaxDepth) return true;
    problem = fmt::format("nested deeper than {}", kMaxDepth);
    return false;
  }
  bool leave() {
    keys_.pop_back();
    return true;
  }

  std::vector<std::set<std::string>> keys_;
};

}  // namespace

json parse_json(std::string_view text, std::string_view source) {
  // The parser takes a NUL for the end of the text and would not look at what comes after.
  if (const auto at = text.find('\0'); at != text.npos) throw_failure("json", "{}: not valid JSON at byte {}: NUL", source, at + 1);
  Checker checker;
  if (!json::sax_parse(text, &checker)) throw_failure("json", "{}: {}", source, checker.problem);
  return json::parse(text);
}

json read_json(const std::filesystem::path& path) {
  return parse_json(read_file(path), path.string());
}

JsonObject::JsonObject(const json& value, std::string where) : json_(value), where_(std::move(where)) {
  if (!value.is_object()) throw_failure("json", "{}: expected an object, got {}", where_, shown(value));
}

bool JsonObject::has(std::string_view field) const {
  const auto found = json_.find(field);
  return found != json_.end() && !found->is_null();
}

bool JsonObject::is_null(std::string_view field) const {
  const auto found = json_.find(field);
  return found != json_.end() && found->is_null();
}

const json& JsonObject::at(std::string_view field) const {
  const auto found = json_.find(field);
  if (found == json_.end()) throw_failure("json", "{}: no field {}", where_, field);
  return *found;
}

void JsonObject::refuse(std::string_view field, std::string_view expected) const {
  throw_failure("json", "{}: {}: expected {}, got {}", where_, field, expected, shown(at(field)));
}

std::int64_t JsonObject::integer(std::string_view field, std::int64_t min, std::int64_t max) const {
  const json& value = at(field);
  const bool fits = value.is_number_integer() &&
                    (!value.is_number_unsigned() ||
                     value.get<std::uint64_t>() <= static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()));
  if (!fits || value.get<std::int64_t>() < min || value.get<std::int64_t>() > max)
    refuse(field, fmt::format("a whole number from {} to {}", min, max));
  return value.get<std::int64_t>();
}

std::int64_t JsonObject::integer_or(std::string_view field, std::int64_t otherwise, std::int64_t min, std::int64_t max) const {
  return has(field) ? integer(field, min, max) : otherwise;
}

double JsonObject::number(std::string_view field, double min, double max) const {
  const json& value = at(field);
  const double number = value.is_number() ? value.get<double>() : std::nan("");
  if (!(number >= min && number <= max)) refuse(field, fmt::format("a number from {:g} to {:g}", min, max));
  return number;
}

double JsonObject::number_or(std::string_view field, double otherwise, double min, double max) const {
  return has(field) ? number(field, min, max) : otherwise;
}

bool JsonObject::boolean(std::string_view field) const {
  if (!at(field).is_boolean()) refuse(field, "true or false");
  return at(field).get<bool>();
}

bool JsonObject::boolean_or(std::string_view field, bool otherwise) const {
  return has(field) ? boolean(field) : otherwise;
}

std::string JsonObject::string(std::string_view field) const {
  if (!at(field).is_string()) refuse(field, "a string");
  return at(field).get<std::string>();
}

std::string JsonObject::string_or(std::string_view field, std::string otherwise) const {
  return has(field) ? string(field) : std::move(otherwise);
}

JsonObject JsonObject::object(std::string_view field) const {
  return {at(field), fmt::format("{}: {}", where_, field)};
}

void JsonObject::expect_only(const std::vector<std::string_view>& known) const {
  for (const auto& [field, value] : json_.items())
    if (std::find(known.begin(), known.end(), field) == known.end()) throw_failure("json", "{}: unknown field {}", where_, field);
}

}  // namespace veloxquant
