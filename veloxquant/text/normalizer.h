// What happens to a text before it is cut into words.
#pragma once

#include <functional>
#include <string>

#include "veloxquant/core/json.h"
#include "veloxquant/text/stretch.h"

namespace veloxquant {

using Normalizer = std::function<Stretch(Stretch stretch)>;

/// Reads the `normalizer` of a tokenizer.json: null, NFC, NFD, NFKC, NFKD, Lowercase, Prepend, Replace (Regex or String), Strip,
/// and a Sequence of them.  Anything else is a std::runtime_error that names it and what is supported.
Normalizer read_normalizer(const nlohmann::json& json, const std::string& where);

}  // namespace veloxquant
