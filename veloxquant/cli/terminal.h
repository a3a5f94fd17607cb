// What commands show a person.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "veloxquant/core/progress.h"
#include "veloxquant/quantize/registry.h"

namespace veloxquant::cli {

/// A call-back that draws one line of progress with the time left on stderr, where that is a terminal, and throws Interrupted after
/// the user pressed Ctrl-C.
ProgressCallback terminal_progress();

/// Wipes the line that terminal_progress drew, if any.
void clear_progress();

/// Makes Ctrl-C stop at the next progress report; a second one ends the process at once.
void install_interrupt_handler();

/// Sends warnings of the library to stderr.
void install_warning_handler();

/// Rows under a header, columns aligned: the first to the left, others to the right.
std::string table(const std::vector<std::vector<std::string>>& rows);

/// "layer_3 keys head 1"; without a head all of the side.
std::string unit_name(int layer, Side side, std::optional<int> head);

/// "1.2 MiB" and the like.
std::string bytes_text(std::size_t bytes);

}  // namespace veloxquant::cli
