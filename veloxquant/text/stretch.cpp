#include "veloxquant/text/stretch.h"

#include <algorithm>

namespace veloxquant {

Stretch slice(const Stretch& stretch, std::size_t begin, std::size_t end) {
  const std::size_t origin = std::clamp(stretch.origin, begin, end) - begin;
  return {stretch.text.substr(begin, end - begin), origin};
}

Stretch prepend(Stretch stretch, std::string_view prefix) {
  stretch.text.insert(0, prefix);
  if (stretch.origin > 0) stretch.origin += prefix.size();
  return stretch;
}

// What stands for several characters comes from the last one of them, as Hugging Face's tokenizers count.
Stretch replace(const Stretch& stretch, const Regex& pattern, std::string_view content) {
  Stretch result;
  std::size_t done = 0;
  const auto copy_until = [&](std::size_t end) {
    if (done < stretch.origin) result.origin = result.text.size() + std::min(end, stretch.origin) - done;
    result.text.append(stretch.text, done, end - done);
    done = end;
  };
  for (const auto& match : pattern.find_all(stretch.text)) {
    copy_until(match.begin);
    result.text += content;
    if (stretch.origin > 0 && match.end <= stretch.origin) result.origin = result.text.size();
    done = match.end;
  }
  copy_until(stretch.text.size());
  return result;
}

}  // namespace veloxquant
