// The regular expressions of tokenizer.json files, which are Oniguruma's, in the syntax of PCRE2.
#pragma once

#include <string>
#include <string_view>

namespace veloxquant {

/// A PCRE2 pattern (with PCRE2_UTF, PCRE2_UCP and PCRE2_MULTILINE) that matches what `pattern` matches in Oniguruma, whose \s, \d,
/// \w, \h and \p{…} it spells out, with the characters of Unicode 16.
///
/// What the two would read differently is refused: throws std::runtime_error that names `where`, the pattern and the part.  That is
/// named groups, back-references, options other than i and m, options from the middle of a group on, sets within sets, negated
/// escapes other than \S in a set, and a + or ? that follows an interval such as {2}.
std::string to_pcre2(std::string_view pattern, std::string_view where);

/// A pattern that matches this text literally.
std::string escape_regex(std::string_view literal);

}  // namespace veloxquant
