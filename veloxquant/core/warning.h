// Warnings go to a call-back, since the library itself never prints.
#pragma once

#include <functional>
#include <string_view>

namespace veloxquant {

using WarningHandler = std::function<void(std::string_view message)>;

/// Installs the receiver of warnings for the whole process; an empty handler (the state at start) drops them.
void set_warning_handler(WarningHandler handler);

/// Passes `message` to the installed handler.  Callable from any thread; the handler runs on the caller's.
void warn(std::string_view message);

}  // namespace veloxquant
