// How veloxquant reports failures.
//
// std::invalid_argument: the caller passed something that cannot work (a count of zero, a shape that does not fit).
// std::runtime_error:    the world outside failed or lied (a file, a device).
// The text of both reads "[where] what was wrong", with the offending value and what is accepted.
#pragma once

#include <stdexcept>
#include <string_view>
#include <utility>

#include <fmt/format.h>

namespace veloxquant {

template <class... Args>
[[noreturn]] void throw_invalid(std::string_view where, fmt::format_string<Args...> format, Args&&... args) {
  throw std::invalid_argument(fmt::format("[{}] {}", where, fmt::format(format, std::forward<Args>(args)...)));
}

template <class... Args>
[[noreturn]] void throw_failure(std::string_view where, fmt::format_string<Args...> format, Args&&... args) {
  throw std::runtime_error(fmt::format("[{}] {}", where, fmt::format(format, std::forward<Args>(args)...)));
}

}  // namespace veloxquant
