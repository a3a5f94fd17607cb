// Regular expressions over UTF-8, as Hugging Face's tokenizers mean them.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "veloxquant/core/json.h"

namespace veloxquant {

struct Match {
  std::size_t begin, end;  // bytes

  bool operator==(const Match&) const = default;
};

/// A pattern in the syntax of Oniguruma (regex_syntax.h), run by PCRE2.  Immutable: may be used from many threads.
class Regex {
 public:
  /// Throws std::runtime_error that names `where` and the pattern if it is not supported or not valid.
  Regex(std::string_view pattern, std::string_view where);

  /// All matches in `text`, which must be valid UTF-8, from left to right without overlap.  An empty match counts unless it stands
  /// at the end of the one before.  Throws std::runtime_error if the pattern backtracks beyond all measure.
  std::vector<Match> find_all(std::string_view text) const;

 private:
  struct Compiled;
  std::shared_ptr<const Compiled> compiled_;
};

/// The field `pattern` of a part of a tokenizer.json: {"Regex": …}, or {"String": …}, which matches literally.
Regex read_pattern(const JsonObject& part);

}  // namespace veloxquant
