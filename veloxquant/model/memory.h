// What to say when memory runs out.
#pragma once

#include <exception>
#include <optional>
#include <string>

namespace veloxquant {

/// A message for a user where `error` says that the process, or the device that MLX computes on, has no memory left: it names the
/// bytes that arrays have taken at most, and those that they may take.  None for any other error.
std::optional<std::string> out_of_memory(const std::exception& error);

}  // namespace veloxquant
