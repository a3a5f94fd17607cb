// Regular expressions over UTF-8, as Hugging Face's tokenizers mean them.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace veloxquant {

struct Match {
  std::size_t begin, end;  // bytes
};

/// A pattern in the syntax of Oniguruma as far as PCRE2 shares it; \s is Unicode's White_Space in both senses.
class Regex {
 public:
  /// Throws std::runtime_error that names `where` and the pattern if it does not compile.
  Regex(const std::string& pattern, const std::string& where);

  /// All matches from left to right, none of them empty.  Throws std::runtime_error if matching runs out of resources.
  std::vector<Match> find_all(std::string_view text) const;

 private:
  struct Compiled;
  std::shared_ptr<const Compiled> compiled_;
};

/// A pattern that matches this text literally.
std::string escape_regex(std::string_view literal);

}  // namespace veloxquant
