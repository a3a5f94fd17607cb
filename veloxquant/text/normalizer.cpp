#include "veloxquant/text/normalizer.h"

#include <fmt/format.h>

#include <algorithm>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "veloxquant/text/regex.h"
#include "veloxquant/text/unicode.h"

namespace veloxquant {
namespace {

constexpr const char* kSupported = "one of NFC, NFD, NFKC, NFKD, Lowercase, Prepend, Replace, Strip, Sequence, or null";

// The end of the character that holds the byte before `position`, which composition may have put there.
std::size_t character_end(std::string_view text, std::size_t position) {
  while (position < text.size() && (static_cast<unsigned char>(text[position]) & 0xC0) == 0x80) ++position;
  return std::min(position, text.size());
}

template <class Change>
Normalizer changed(Change change) {
  return [change](const Stretch& stretch) {
    Stretch result{change(stretch.text)};
    if (stretch.origin > 0) result.origin = character_end(result.text, change(stretch.text.substr(0, stretch.origin)).size());
    return result;
  };
}

Normalizer read_prepend(const JsonObject& json) {
  return [prefix = json.string("prepend")](Stretch stretch) {
    return stretch.text.empty() ? stretch : prepend(std::move(stretch), prefix);
  };
}

Normalizer read_replace(const JsonObject& json) {
  return [pattern = read_pattern(json), content = json.string("content")](const Stretch& stretch) {
    return replace(stretch, pattern, content);
  };
}

Normalizer read_strip(const JsonObject& json) {
  return [left = json.boolean("strip_left"), right = json.boolean("strip_right")](const Stretch& stretch) {
    const std::string_view text = stretch.text;
    const std::size_t begin = left ? skip_space_after(text, 0) : 0;
    const std::size_t end = right ? skip_space_before(text, text.size(), begin) : text.size();
    return slice(stretch, begin, end);
  };
}

Normalizer read_sequence(const JsonObject& json) {
  const auto& list = json.at("normalizers");
  if (!list.is_array()) json.refuse("normalizers", "a list");
  std::vector<Normalizer> parts;
  for (const auto& item : list)
    parts.push_back(read_normalizer(item, fmt::format("{}: normalizers[{}]", json.where(), parts.size())));
  return [parts](Stretch stretch) {
    for (const auto& part : parts) stretch = part(std::move(stretch));
    return stretch;
  };
}

}  // namespace

Normalizer read_normalizer(const nlohmann::json& value, const std::string& where) {
  static const std::unordered_map<std::string, NormalForm> forms = {
      {"NFC", NormalForm::kNfc}, {"NFD", NormalForm::kNfd}, {"NFKC", NormalForm::kNfkc}, {"NFKD", NormalForm::kNfkd}};
  if (value.is_null()) return [](Stretch stretch) { return stretch; };
  const JsonObject json(value, where);
  const std::string type = json.string("type");
  if (const auto form = forms.find(type); form != forms.end())
    return changed([form = form->second](const std::string& text) { return normalize(text, form); });
  if (type == "Lowercase") return changed([](const std::string& text) { return lowercase(text); });
  if (type == "Prepend") return read_prepend(json);
  if (type == "Replace") return read_replace(json);
  if (type == "Strip") return read_strip(json);
  if (type == "Sequence") return read_sequence(json);
  json.refuse("type", kSupported);
}

}  // namespace veloxquant
