// What a chat model reads: its template around a message.
#pragma once

#include <filesystem>
#include <string>
#include <string_view>

namespace veloxquant {

/// `message` as the one message of a user, and the begin of the answer, as the chat template in `folder` writes them: of
/// chat_template.jinja, else of tokenizer_config.json ("chat_template", of several the one named "default"), else of
/// chat_template.json.  Special tokens are in it as text, the begin of text too: encode it without adding any.
///
/// Throws std::runtime_error that names what is missing where there is none, and the file where its template fails.
std::string chat_prompt(const std::filesystem::path& folder, std::string_view message);

}  // namespace veloxquant
