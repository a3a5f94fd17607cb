// Strict reading of JSON from outside.
#pragma once

#include <cstdint>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace veloxquant {

/// Parses one JSON value.  Throws std::runtime_error that names `source` and the place: for anything that is not valid JSON in
/// UTF-8, for objects and arrays nested deeper than 64, and for a key that stands twice in one object.
nlohmann::json parse_json(std::string_view text, std::string_view source);

/// parse_json of a file.
nlohmann::json read_json(const std::filesystem::path& path);

/// Typed access to the fields of an object.  What does not fit is a std::runtime_error that names source, field, value and what is
/// accepted.  Holds a reference: the JSON must outlive it.
class JsonObject {
 public:
  /// Throws unless `json` is an object.  `where`: the file, and the path of fields to here.
  JsonObject(const nlohmann::json& json, std::string where);

  const std::string& where() const { return where_; }

  /// Whether the field is there and not null.
  bool has(std::string_view field) const;

  /// Whether the field is there, and null.
  bool is_null(std::string_view field) const;

  std::int64_t integer(std::string_view field, std::int64_t min = std::numeric_limits<std::int64_t>::min(),
                       std::int64_t max = std::numeric_limits<std::int64_t>::max()) const;
  std::int64_t integer_or(std::string_view field, std::int64_t otherwise, std::int64_t min, std::int64_t max) const;

  /// Finite, in [min, max].
  double number(std::string_view field, double min = std::numeric_limits<double>::lowest(),
                double max = std::numeric_limits<double>::max()) const;
  double number_or(std::string_view field, double otherwise, double min, double max) const;

  bool boolean(std::string_view field) const;
  bool boolean_or(std::string_view field, bool otherwise) const;

  std::string string(std::string_view field) const;
  std::string string_or(std::string_view field, std::string otherwise) const;

  JsonObject object(std::string_view field) const;

  /// The field as it is.  Throws if it is not there.
  const nlohmann::json& at(std::string_view field) const;

  /// Throws, naming it, if there is a field that is not in `known`.
  void expect_only(const std::vector<std::string_view>& known) const;

  /// Throws: "[json] where: field: expected …, got …".
  [[noreturn]] void refuse(std::string_view field, std::string_view expected) const;

 private:
  const nlohmann::json& json_;
  std::string where_;
};

}  // namespace veloxquant
