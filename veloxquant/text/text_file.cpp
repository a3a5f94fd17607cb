#include "veloxquant/text/text_file.h"

#include <algorithm>

#include "veloxquant/core/error.h"
#include "veloxquant/core/file.h"
#include "veloxquant/text/unicode.h"

namespace veloxquant {

std::string read_text(const std::filesystem::path& path) {
  std::string text = read_file(path);
  if (text.empty()) throw_failure("text", "{}: expected some text, got an empty file", path.string());
  const std::string valid = repair_utf8(text);
  if (valid == text) return text;
  // They are alike up to the first broken sequence.
  const auto at = std::mismatch(text.begin(), text.end(), valid.begin(), valid.end()).first - text.begin();
  throw_failure("text", "{}: expected UTF-8, got byte {:#04x} at {}", path.string(),
                static_cast<unsigned char>(text[static_cast<std::size_t>(at)]), at);
}

}  // namespace veloxquant
