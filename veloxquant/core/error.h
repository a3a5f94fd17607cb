// How veloxquant reports failures.
//
// std::invalid_argument: the caller passed something that cannot work (a count of zero, a shape that does not fit).
// std::runtime_error:    the world outside failed or lied (a file, a device).
// The text of both reads "[where] what was wrong", with the offending value and what is accepted, in one line.
#pragma once

#include <fmt/format.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

namespace veloxquant {

/// Control characters become spaces: names out of a hostile file must neither break a message into lines nor steer a terminal.
inline std::string one_line(std::string text) {
  std::replace_if(
      text.begin(), text.end(), [](unsigned char c) { return c < 0x20 || c == 0x7f; }, ' ');
  return text;
}

/// `text` as far as a message should show it: at most `most` bytes of whole UTF-8 characters, then an ellipsis.
inline std::string excerpt(std::string_view text, std::size_t most = 60) {
  if (text.size() <= most) return std::string(text);
  while (most > 0 && (text[most] & 0xC0) == 0x80) --most;
  return std::string(text.substr(0, most)) + "…";
}

template <class... Args>
[[noreturn]] void throw_invalid(std::string_view where, fmt::format_string<Args...> format, Args&&... args) {
  throw std::invalid_argument(one_line(fmt::format("[{}] {}", where, fmt::format(format, std::forward<Args>(args)...))));
}

template <class... Args>
[[noreturn]] void throw_failure(std::string_view where, fmt::format_string<Args...> format, Args&&... args) {
  throw std::runtime_error(one_line(fmt::format("[{}] {}", where, fmt::format(format, std::forward<Args>(args)...))));
}

}  // namespace veloxquant
