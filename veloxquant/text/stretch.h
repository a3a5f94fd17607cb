// A part of a text on its way into tokens.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "veloxquant/text/regex.h"

namespace veloxquant {

/// Valid UTF-8.  What has become of the first character of the whole text is kept count of, since Metaspace may prepend there only.
struct Stretch {
  std::string text;
  std::size_t origin = 0;  // so many bytes at the start come from the first character of the whole text
};

/// The bytes from `begin` to `end`.
Stretch slice(const Stretch& stretch, std::size_t begin, std::size_t end);

/// With `prefix` before it, which counts as part of what it stands before.
Stretch prepend(Stretch stretch, std::string_view prefix);

/// With `content` in place of each match of `pattern`.
Stretch replace(const Stretch& stretch, const Regex& pattern, std::string_view content);

}  // namespace veloxquant
